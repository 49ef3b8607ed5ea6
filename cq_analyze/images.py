"""Pictures of two series, compared pair by pair: PSNR, SSIM, and LPIPS if its package is there.

Owns what makes a pair (the file name), the metrics, the contact sheet and the thumbnails. Pictures
are decoded one pair at a time. Pillow and scikit-image come with `cq[images]`.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cq.core.errors import InputError, ResourceError
from cq.core.text import printable
from cq_analyze.metrics import finite
from cq_analyze.report import Finding, finding, natural

if TYPE_CHECKING:
    import numpy
    from PIL.Image import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
_THUMBNAIL = 256
_SSIM_WINDOW = 7
_GAIN = 8  # of the difference on the contact sheet, which would be black otherwise
_MOST_ROWS = 64
_Perceptual = Callable[["numpy.ndarray[Any, Any]", "numpy.ndarray[Any, Any]"], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """One pair. `psnr` is in dB, infinite for equal pictures; `ssim` None for pictures smaller than
    its window, `lpips` without its package. `strip` is a PNG of both and their difference."""

    name: str
    width: int
    height: int
    psnr: float
    ssim: float | None
    lpips: float | None
    strip: bytes = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON; `psnr_db` is null for equal pictures."""
        return {
            "name": self.name,
            "width": self.width,
            "height": self.height,
            "equal": math.isinf(self.psnr),
            "psnr_db": finite(self.psnr),
            "ssim": self.ssim,
            "lpips": self.lpips,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Pictures:
    """All pairs in natural order of their names, and what was found on the way."""

    reference: str
    compared: str
    pictures: tuple[Picture, ...]
    findings: tuple[Finding, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def worst(self) -> tuple[Picture, ...]:
        """The pairs, the lowest PSNR first."""
        return tuple(sorted(self.pictures, key=lambda picture: picture.psnr))

    @property
    def mean_psnr(self) -> float | None:
        """Mean over pairs that are not equal.

        Units: dB.
        """
        return _mean(p.psnr for p in self.pictures if math.isfinite(p.psnr))

    @property
    def mean_ssim(self) -> float | None:
        """Mean over all pairs that have one."""
        return _mean(p.ssim for p in self.pictures if p.ssim is not None)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON."""
        return {
            "reference": self.reference,
            "compared": self.compared,
            "mean_psnr_db": self.mean_psnr,
            "min_psnr_db": finite(min((p.psnr for p in self.pictures), default=None)),
            "mean_ssim": self.mean_ssim,
            "pairs": [picture.to_dict() for picture in self.pictures],
        }


def compare_images(reference: Path | str, compared: Path | str) -> Pictures:
    """Compare the pictures of two directories that have the same names.

    A picture that only one has, that is none, or of another size than its counterpart is a finding.

    Raises: InputError if one is no directory or holds no picture; ResourceError without Pillow and
    scikit-image.
    """
    check_installed()
    left, right = _listed(Path(reference)), _listed(Path(compared))
    perceptual, notes = _perceptual()
    notes += [
        f"folders inside `{printable(str(each))}` are not looked into"
        for each in (reference, compared)
        if any(path.is_dir() for path in Path(each).iterdir())
    ]
    pictures: list[Picture] = []
    findings: list[Finding] = []
    for name in sorted({*left, *right}, key=natural):
        if name not in left or name not in right:
            where = printable(str(compared if name in left else reference))
            findings.append(finding("images.missing", name, f"is not in `{where}`"))
            continue
        found = _pair(name, left[name], right[name], perceptual)
        if isinstance(found, Picture):
            pictures.append(found)
        else:
            findings.append(found)
    return Pictures(
        reference=printable(str(reference)),
        compared=printable(str(compared)),
        pictures=tuple(pictures),
        findings=tuple(findings),
        notes=tuple(notes),
    )


def check_installed() -> None:
    """Raises: ResourceError if the packages that pictures need are not there."""
    missing = [name for name in ("PIL", "skimage") if find_spec(name) is None]
    if missing:
        raise ResourceError(
            f"comparing pictures needs Pillow and scikit-image, but there is no `{missing[0]}`",
            hint="install them: `pip install pillow scikit-image`",
            code="resource.package",
        )


def contact_sheet(pictures: Pictures) -> bytes:
    """A PNG with a row for each pair, the worst first: the reference, the other and their
    difference, eight times as strong."""
    from PIL import Image, ImageDraw

    line = 18
    rows = [(p, Image.open(io.BytesIO(p.strip))) for p in pictures.worst[:_MOST_ROWS]]
    width = max((strip.width for _, strip in rows), default=3 * _THUMBNAIL)
    height = sum(strip.height + line for _, strip in rows)
    sheet = Image.new("RGB", (width, max(height, line)), "white")
    draw = ImageDraw.Draw(sheet)
    top = 0
    for picture, strip in rows:
        draw.text((4, top + 3), _ascii(f"{picture.name}: {told(picture)}"), fill="black")
        sheet.paste(strip, (0, top + line))
        top += strip.height + line
    return _png(sheet)


def told(picture: Picture) -> str:
    """The metrics in words: `PSNR 31.20 dB, SSIM 0.9512`."""
    parts = ["equal" if math.isinf(picture.psnr) else f"PSNR {picture.psnr:.2f} dB"]
    parts += [] if picture.ssim is None else [f"SSIM {picture.ssim:.4f}"]
    parts += [] if picture.lpips is None else [f"LPIPS {picture.lpips:.4f}"]
    return ", ".join(parts)


def psnr(
    reference: numpy.ndarray[Any, Any], compared: numpy.ndarray[Any, Any], peak: float = 255.0
) -> float:
    """Peak signal to noise ratio of two arrays of one shape.

    Units: dB; infinite for equal arrays.
    """
    import numpy as np

    error = float(np.mean(np.square(reference.astype(np.float64) - compared)))
    return math.inf if error == 0 else 10 * math.log10(peak * peak / error)


def _listed(directory: Path) -> Mapping[str, Path]:
    shown = printable(str(directory))
    try:
        found = {
            path.name: path
            for path in directory.iterdir()
            if path.suffix.lower() in SUFFIXES and path.is_file()
        }
    except OSError as error:
        told = (error.strerror or str(error)).lower()
        raise InputError(
            f"the pictures in `{shown}` cannot be listed: {told}",
            where=shown,
            hint="`--images` takes two directories",
            code="input.images",
        ) from error
    if not found:
        raise InputError(
            f"there is no picture in `{shown}`",
            where=shown,
            hint="pictures end in " + ", ".join(SUFFIXES),
            code="input.images",
        )
    return found


def _pair(name: str, left: Path, right: Path, perceptual: _Perceptual | None) -> Picture | Finding:
    opened: list[Image] = []
    for path in (left, right):
        image = _open(path)
        if isinstance(image, str):
            told = f"cannot be read in `{printable(str(path.parent))}`: {image}"
            return finding("images.unreadable", name, told)
        opened.append(image)
    first, second = opened
    if first.size != second.size:
        told = f"is {first.width}x{first.height} in the reference, {second.width}x{second.height}"
        return finding("images.shape", name, f"{told} in the other series")
    import numpy as np

    a, b = np.asarray(first), np.asarray(second)
    return Picture(
        name=name,
        width=first.width,
        height=first.height,
        psnr=psnr(a, b),
        ssim=_ssim(a, b),
        lpips=None if perceptual is None else perceptual(a, b),
        strip=_strip(first, second),
    )


def _open(path: Path) -> Image | str:
    """The picture in RGB, or why it is none."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            if image.mode.startswith("I"):  # 16 bits, which a conversion would clip to 8
                return image.convert("I").point(lambda value: value / 257).convert("RGB")
            if image.has_transparency_data:  # seen before gray, so that it is compared as well
                gray = Image.new("RGBA", image.size, (128, 128, 128, 255))
                return Image.alpha_composite(gray, image.convert("RGBA")).convert("RGB")
            return image.convert("RGB")
    # Whatever a decoder stumbles over: SyntaxError and struct.error are among it.
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, EOFError) as error:
        return printable(str(error)) or type(error).__name__


def _ssim(a: numpy.ndarray[Any, Any], b: numpy.ndarray[Any, Any]) -> float | None:
    from skimage.metrics import structural_similarity

    if min(a.shape[:2]) < _SSIM_WINDOW:
        return None
    found = structural_similarity(a, b, channel_axis=2, data_range=255)  # type: ignore[no-untyped-call]
    return float(found)


def _strip(first: Image, second: Image) -> bytes:
    from PIL import Image, ImageChops

    difference = ImageChops.difference(first, second).point(lambda value: min(255, value * _GAIN))
    shown = []
    for image in (first, second, difference):
        small = image.copy()
        small.thumbnail((_THUMBNAIL, _THUMBNAIL))
        shown.append(small)
    strip = Image.new("RGB", (sum(s.width for s in shown), shown[0].height), "white")
    left = 0
    for small in shown:
        strip.paste(small, (left, 0))
        left += small.width
    return _png(strip)


def _png(image: Image) -> bytes:
    held = io.BytesIO()
    image.save(held, "PNG")
    return held.getvalue()


def _ascii(text: str) -> str:
    return text.encode("ascii", "replace").decode()  # all that Pillow's own font has


def _perceptual() -> tuple[_Perceptual | None, list[str]]:
    """LPIPS as a function of two pictures, None without its package or its weights."""
    try:
        import lpips  # type: ignore[import-not-found]
    except ImportError:
        return None, []
    import torch

    try:
        model = lpips.LPIPS(net="alex", verbose=False).eval()
    except Exception as error:  # its weights may have to be fetched
        told = printable(str(error))[:120]
        return None, [f"LPIPS is installed, but cannot be used: {told}"]

    def distance(a: numpy.ndarray[Any, Any], b: numpy.ndarray[Any, Any]) -> float:
        pair = [
            torch.from_numpy(x.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1 for x in (a, b)
        ]
        with torch.no_grad():
            return float(model(*pair).mean())

    return distance, []


def _mean(values: Iterable[float]) -> float | None:
    every = list(values)
    return math.fsum(every) / len(every) if every else None
