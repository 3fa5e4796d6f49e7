"""The image noise prior (Section 3.2, Equations 3-8) and its optimal shrinkage (ours, not in the paper).

| paper | here |
| --- | --- |
| z_0^i, z_0^1, z_t^i | `z_0`, `z_first`, `z_t` |
| Delta z^i | `delta_z` |
| C_t^i | `c_t` |
| epsilon_t^i, epsilon_t^{i->1} | `noise`, `prior` |
| sqrt(abar_t), sqrt(1 - abar_t) | `signal`, `sigma` |

All functions compute in float32, also under autocast: at small t the prior divides the difference of two nearly equal
numbers by 0.01, where bfloat16 has an error as large as the motion. Tensors of frames are [B, C, F, H, W], the
first frame is [B, C, 1, H, W], `signal` and `sigma` broadcast.
"""

from __future__ import annotations

import torch


def one_step_backward(
    z_t: torch.Tensor, noise: torch.Tensor, signal: torch.Tensor, sigma: torch.Tensor
) -> torch.Tensor:
    """One-step backward diffusion (Equations 3 and 7): returns the clean latent that `noise` implies for `z_t`.

    The true noise of frame i gives z_0^i (Equation 3); the image noise prior gives z_0^1 (Equation 7).
    """
    return (z_t.float() - sigma * noise.float()) / signal


def residual_item(z_0: torch.Tensor, z_first: torch.Tensor) -> torch.Tensor:
    """Residual item (Equation 4): Delta z^i = z_0^i - z_0^1."""
    return z_0.float() - z_first.float()


def scaled_residual(delta_z: torch.Tensor, signal: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Scaled residual (Equation 5): C_t^i = sqrt(abar_t) Delta z^i / sqrt(1 - abar_t)."""
    return signal * delta_z.float() / sigma


def unscaled_residual(c_t: torch.Tensor, signal: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Equation 5 solved for the residual item (Equation 6): Delta z^i = sqrt(1 - abar_t) C_t^i / sqrt(abar_t)."""
    return sigma * c_t.float() / signal


def image_noise_prior(
    z_t: torch.Tensor, z_first: torch.Tensor, signal: torch.Tensor, sigma: torch.Tensor
) -> torch.Tensor:
    """Image noise prior (Equation 8): eps^{i->1} = (z_t^i - sqrt(abar_t) z_0^1) / sqrt(1 - abar_t).

    It equals eps^i + C^i, so for frame 1, and for every frame of a still clip, it is the noise itself.
    """
    return (z_t.float() - signal * z_first.float()) / sigma


def optimal_shrinkage(
    signal: torch.Tensor, sigma: torch.Tensor, residual_std: torch.Tensor, error: float | torch.Tensor = 1.0
) -> torch.Tensor:
    """Returns lambda(t, i), the best weight of the prior against another noise estimate of mean square error `error`.

    The error of the prior is C_t^i, of variance signal^2 s_i^2 / sigma^2 for Delta z^i ~ N(0, s_i^2). So

        lambda = error sigma^2 / (error sigma^2 + signal^2 s_i^2)

    minimises E|eps - lambda prior - (1 - lambda) estimate|^2. With `error` 1 the other estimate is zero, the mean of
    the noise, and lambda is lambda*, the best weight of the prior without another estimate. Ours: the paper's lambda^i
    of Equation 9 depends on the frame but not on the time step (docs/decisions/fusion.md).

    Args:
        signal: sqrt(alphabar_t), broadcastable to [B, 1, F, 1, 1].
        sigma: sqrt(1 - alphabar_t), likewise.
        residual_std: s_i, the standard deviation of the residual item by frame, likewise.
        error: mean square error of the other estimate, likewise.
    """
    variance = (signal * residual_std).square()
    reference = error * sigma.square()
    return reference / (reference + variance)


def unknown_share(
    signal: torch.Tensor, sigma: torch.Tensor, residual_std: torch.Tensor, error: float | torch.Tensor = 1.0
) -> torch.Tensor:
    """Returns 1 - `optimal_shrinkage`, computed without cancellation where lambda is close to 1."""
    variance = (signal * residual_std).square()
    return variance / (error * sigma.square() + variance)


def normalised_prior(
    z_t: torch.Tensor, z_first: torch.Tensor, signal: torch.Tensor, sigma: torch.Tensor, residual_std: torch.Tensor
) -> torch.Tensor:
    """Returns the prior with unit variance: (z_t - signal z_first) / sqrt(sigma^2 + signal^2 s_i^2).

    Its variance is 1 at every time step. Ours: under `prediction="shrinkage"` the attention of the fusion module reads
    it instead of the prior of Equation 8.
    """
    deviation = (sigma.square() + (signal * residual_std).square()).sqrt()
    return (z_t.float() - signal * z_first.float()) / deviation
