"""From a model to the files that runtimes execute; each is checked before it is written."""
