"""Forms of the linear-attention core: the same function of q, k and v, with named products.

Quantization selects the two matrix products by their module names, ``core.kv`` and ``core.out``.
Shape suffixes as in `care_compress.model.care`; e is d plus one row that counts tokens.
"""

import torch
from torch import Tensor, nn

from care_compress.model.care import ATTENTION_EPS, positive_features


class Product(nn.Module):
    """A matrix product of two activations."""

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        """Left @ right."""
        return torch.matmul(left, right)


class AttentionCore(nn.Module):
    """Linear attention as published; q and k arrive before the feature map."""

    def __init__(self) -> None:
        super().__init__()
        self.kv = Product()
        self.out = Product()

    def forward(self, q_BhdN: Tensor, k_BhdN: Tensor, v_BhdN: Tensor) -> Tensor:
        """out_n = (q_n . kv) / (q_n . mean(k) + eps)."""
        q, k = positive_features(q_BhdN), positive_features(k_BhdN)
        vk_Bhdd = self.kv(v_BhdN, k.transpose(-1, -2)) / q.shape[-1]
        numerator: Tensor = self.out(vk_Bhdd, q)
        return numerator / (mean_weight(q, k) + ATTENTION_EPS)


class FusedCore(AttentionCore):
    """[v, 1] as the operand: the extra row of the product is the normaliser.

    [v; 1] k^T q / N = [numerator; q . mean(k)]. The division by N stays: dropping it is exact only
    with eps * N, and float16 needs the smaller numbers.
    """

    def forward(self, q_BhdN: Tensor, k_BhdN: Tensor, v_BhdN: Tensor) -> Tensor:
        """Numerator and denominator from one product."""
        q, k = positive_features(q_BhdN), positive_features(k_BhdN)
        v1_BheN = torch.cat([v_BhdN, torch.ones_like(v_BhdN[:, :, :1])], dim=2)
        v1k_Bhed = self.kv(v1_BheN, k.transpose(-1, -2)) / q.shape[-1]
        both_BheN: Tensor = self.out(v1k_Bhed, q)
        return both_BheN[:, :, :-1] / (both_BheN[:, :, -1:] + ATTENTION_EPS)


class CovarianceCore(AttentionCore):
    """The form to quantize: the rank-one mean leaves kv before kv is rounded.

    C = kv - mean(v) mean(k)^T and D_n = q_n . mean(k), so out_n = (C q_n + mean(v) D_n) / (D_n +
    eps). kv is dominated by its mean, which varies from image to image and would eat the range; C
    is what attention adds to it (+5 to 15 dB at 8 bits). Numerator and denominator read the same
    quantized q and k, and D stays positive because both are.
    """

    def forward(self, q_BhdN: Tensor, k_BhdN: Tensor, v_BhdN: Tensor) -> Tensor:
        """Attention through the covariance of k and v."""
        q, k = positive_features(q_BhdN), positive_features(k_BhdN)
        v_mean = v_BhdN.mean(dim=-1, keepdim=True)
        k_mean = k.mean(dim=-1, keepdim=True)
        vk_Bhdd = self.kv(v_BhdN, k.transpose(-1, -2)) / q.shape[-1]
        covariance_Bhdd = vk_Bhdd - v_mean * k_mean.transpose(-1, -2)
        weight = mean_weight(q, k)
        spread: Tensor = self.out(covariance_Bhdd, q)
        return (spread + v_mean * weight) / (weight + ATTENTION_EPS)


def mean_weight(q_BhdN: Tensor, k_BhdN: Tensor) -> Tensor:
    """q_n . mean(k) for every token (B, h, 1, N): what the attention weights of a token sum to."""
    return (q_BhdN * k_BhdN.mean(dim=-1, keepdim=True)).sum(dim=-2, keepdim=True)
