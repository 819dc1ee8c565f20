"""Running a model or an artifact: one `Predictor` protocol, one file per runtime."""
