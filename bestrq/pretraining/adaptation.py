"""Changes of projection and codes during a run: principal components, cluster means, codes distilled from layers.

Source: RWTH, arXiv 2606.30671. The projection is replaced once, after `pca_steps`, by the principal components of the
stacks so far; at every step of `refine_steps` each code becomes the mean of the projected stacks that had it as target
in the steps of the window. Statistics are sums in float64 over the stacks with a target, so they depend on neither
world size nor accumulation beyond the rounding of float64. Imported only if a change is set.

K width of a stack, d codebook_dim, C codebooks, V codes, N stacks.
"""

import hashlib
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from bestrq.pretraining.distillation import DistilledCodebook, replaced_codes
from bestrq.pretraining.matching import match
from bestrq.pretraining.quantizer import QuantizerSettings, RandomProjectionQuantizer
from bestrq.training.process import World
from common.errors import UserError

SMALLEST_VARIANCE = 1e-6
"""share of the largest variance below which whitening does not amplify a component further"""
SLICE = 1 << 14
"""stacks converted to float64 at a time: 42 MB at K = 320"""


class Adaptation:
    """Statistics and updates of a quantizer, in place.

    The statistics are sums of this rank; `tensors` sums them over ranks, and after `restore` rank 0 continues the sums.
    """

    def __init__(
        self, quantizer: RandomProjectionQuantizer, settings: QuantizerSettings, distill_steps: Sequence[int] = ()
    ) -> None:
        """The quantizer must be the freshly drawn one; with `distill_steps`, its last codebook is not refined."""
        codebooks, width, dim = quantizer.projection.shape
        if settings.pca_steps and dim > width:
            raise UserError(f"quantizer.codebook_dim is {dim}, but a stack has only {width} components: give fewer")
        for before, step in zip([settings.pca_steps, *settings.refine_steps], settings.refine_steps, strict=False):
            if step < before + settings.refine_window:  # the window would hold stacks of two projections or codebooks
                raise UserError(
                    f"quantizer.refine_steps has {step}: give at least {before + settings.refine_window}, that is "
                    f"refine_window = {settings.refine_window} steps after {before}, or a shorter window"
                )
        self.quantizer, self.settings, self.distill_steps = quantizer, settings, distill_steps
        self.origin = origin(quantizer)
        device = quantizer.projection.device
        exact = {"dtype": torch.float64, "device": device}
        self.statistics: dict[str, Tensor] = {}
        if settings.pca_steps:
            shapes: dict[str, tuple[int, ...]] = {"count": (), "sum": (width,), "products": (width, width)}
            self.statistics |= {name: torch.zeros(shape, **exact) for name, shape in shapes.items()}  # type: ignore[call-overload]
        if settings.refine_steps:
            shapes = {"code_counts": (codebooks, settings.codebook_size)}
            shapes["code_sums"] = (*shapes["code_counts"], dim)
            self.statistics |= {name: torch.zeros(shape, **exact) for name, shape in shapes.items()}  # type: ignore[call-overload]

    @torch.no_grad()
    def observe(self, step: int, stacks: Tensor, codes: Tensor) -> None:
        """Add the stacks `[N, K]` of a step with their codes, int64 `[N, C]`. No host wait."""
        if step <= self.settings.pca_steps:
            self.statistics["count"] += len(stacks)
            for part in stacks.split(SLICE):
                exact = part.double()
                self.statistics["sum"] += exact.sum(dim=0)
                self.statistics["products"].addmm_(exact.T, exact)
        if any(last - self.settings.refine_window < step <= last for last in self.settings.refine_steps):
            self.statistics["code_counts"].scatter_add_(1, codes.T, torch.ones_like(codes.T, dtype=torch.float64))
            projected = self.quantizer.project(stacks).double()
            index = codes.T.unsqueeze(-1).expand_as(projected)
            self.statistics["code_sums"].scatter_add_(1, index, projected)

    @torch.no_grad()
    def update(self, step: int, world: World, distilled: DistilledCodebook | None = None) -> str:
        """Apply the change that is due after this step; all ranks must call it. distilled: see `distill_steps`.

        Returns a line for the console, or "" if nothing has changed. Raises UserError if there were no stacks.
        """
        changed = ""
        if step == self.settings.pca_steps:
            count, total, products = (world.sum(self.statistics[name]) for name in ("count", "sum", "products"))
            if not count:
                raise UserError(
                    f"quantizer.pca_steps is {step}, but no stack had a target so far: raise it, or mask more frames"
                )
            projection, offset, share = principal_components(
                count.cpu(), total.cpu(), products.cpu(), self.quantizer.projection.shape[2], self.settings.whitening
            )
            self._replace(world, projection=projection, offset=offset)
            changed = f"projection replaced by principal components with {share:.1%} of the variance"
        if step in self.settings.refine_steps:
            counts, sums = (world.sum(self.statistics[name]).cpu() for name in ("code_counts", "code_sums"))
            codebook = self.quantizer.codebook.cpu()
            if self.distill_steps:
                counts[-1] = 0
            if world.is_main:
                codebook = torch.stack([refined(*book) for book in zip(codebook, counts, sums, strict=True)])
            self._replace(world, codebook=codebook)
            self.statistics["code_counts"].zero_()
            self.statistics["code_sums"].zero_()
            changed = f"codes refined: {int((counts > 0).sum())} of {counts.numel()} moved to the mean of their stacks"
        if step in self.distill_steps:
            assert distilled is not None
            last = replaced_codes(self.quantizer.codebook[-1], distilled, world)
            self._replace(world, codebook=torch.cat([self.quantizer.codebook[:-1], last[None]]))
            changed += "; " * bool(changed) + "distilled codes in place of the last codebook"
        return changed

    def _replace(self, world: World, **buffers: Tensor) -> None:
        """Copy rank 0's tensors, `[...]` or `[C, ...]`, into the buffers of all ranks, which stay bit-identical."""
        for name, value in buffers.items():
            buffer = self.quantizer.get_buffer(name)
            value = value.to(buffer.device, buffer.dtype)
            buffer.copy_(world.sum(value if world.is_main else torch.zeros_like(value)))

    def tensors(self, world: World) -> dict[str, Tensor]:
        """Statistics over all ranks, and the origin of the quantizer, for a checkpoint; all ranks must call it."""
        sums = {f"adaptation.{name}": world.sum(value) for name, value in self.statistics.items()}
        return sums | {"adaptation.origin": self.origin}

    def restore(self, tensors: Mapping[str, Tensor], where: object, world: World) -> None:
        """Load buffers and statistics of a checkpoint. Raises UserError if it continues another initial quantizer."""
        if not torch.equal(tensors.get("adaptation.origin", torch.zeros(0)), self.origin):
            raise UserError(
                f"{where} has another quantizer: it was drawn from another quantizer.seed or with another shape"
            )
        for name, buffer in self.quantizer.state_dict().items():
            buffer.copy_(tensors[f"quantizer.{name}"])
        if world.is_main:  # the saved statistics are a sum over ranks, so only one rank continues them
            for name, value in self.statistics.items():
                value.copy_(tensors[f"adaptation.{name}"])


def origin(quantizer: RandomProjectionQuantizer) -> Tensor:
    """Hash of projection and codes, int64 `[1]`: a changed quantizer is identified by its first state."""
    digest = hashlib.sha256()
    for tensor in (quantizer.projection, quantizer.codebook):
        digest.update(repr(tuple(tensor.shape)).encode() + tensor.detach().cpu().numpy().tobytes())
    return torch.tensor([int.from_bytes(digest.digest()[:8], "big", signed=True)])


def principal_components(
    count: Tensor, total: Tensor, products: Tensor, dim: int, whitening: float
) -> tuple[Tensor, Tensor, float]:
    """Projection on the first `dim` principal components, from sums in float64.

    Args:
        count: number of stacks. total: their sum `[K]`. products: sum of x x^T, `[K, K]`.
        whitening: component i is divided by std_i ** whitening.

    Returns:
        projection `[K, dim]` and offset `[dim]`, so that `x @ projection + offset` are the components of x - mean, and
        the share of the variance that they hold. The largest weight of a component is positive, since eigenvectors have
        no sign.
    """
    mean = total / count
    variances, vectors = torch.linalg.eigh(products / count - torch.outer(mean, mean))
    variances, vectors = variances.flip(0)[:dim].clamp(min=0), vectors.flip(1)[:, :dim]
    share = float(variances.sum() / (products.diagonal() / count - mean**2).sum())
    largest = vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True))
    floor = (SMALLEST_VARIANCE * variances[0]).clamp(min=torch.finfo(torch.float64).tiny)
    projection = vectors * largest.sign() / variances.clamp(min=floor).pow(whitening / 2)
    return projection, -(mean @ projection), share


def refined(codes: Tensor, counts: Tensor, sums: Tensor) -> Tensor:
    """Codes `[V, d]` after a step of spherical k-means: the mean of the projected stacks of each code, at unit norm.

    A code without stacks stays. The new codes are then assigned to the old ids so that the sum of cosines between the
    old and the new code of an id is largest (Hungarian method): the weights of the heads keep their meaning.

    Args:
        codes: float32, unit norm. counts: float64 `[V]`. sums: float64 `[V, d]`, of projected stacks of unit norm.
    """
    lengths = sums.norm(dim=-1)
    used = ((counts > 0) & (lengths > 0)).nonzero().squeeze(1)  # opposite stacks may cancel
    means = F.normalize(sums[used], dim=-1)
    order = torch.from_numpy(match((codes[used].double() @ means.T).numpy()))
    new = codes.clone()
    new[used] = means[order].to(codes.dtype)
    return new
