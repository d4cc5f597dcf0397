"""A model in a GGUF file, which transformers reads with its weights dequantised.

The header is read here first: transformers takes a file that ends early or lacks tensors, and fills them at random.
Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import io
import mmap
import re
import shutil
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from importlib.util import find_spec
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from kvcomp.errors import CorruptData, InvalidInput, UnsupportedModel

SUFFIX = ".gguf"
PART = re.compile(r"(?P<whole>.+\.gguf)\.part(?P<number>\d+)(?:of(?P<count>\d+))?")  # of any size, cut anywhere
WEIGHTS = "*.safetensors", "pytorch_model*.bin"
PACKAGES = "gguf", "accelerate"  # that transformers needs to read one
MAGIC, VERSIONS, ALIGNMENT = b"GGUF", (2, 3), 32
SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}  # struct's letter of each type of a value
STRING, ARRAY = 8, 9
F16, BF16 = 1, 30  # types of tensors
INSTEAD = "use the model's folder of safetensors instead"
FOREIGN = (
    OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, ArithmeticError, ImportError,
)  # fmt: skip
"""What transformers may raise over a file that it cannot read."""


@dataclass(frozen=True)
class Header:
    """What a GGUF file says before its tensors."""

    values: dict[str, Any]
    """Those that are no arrays."""
    tensors: dict[str, int]
    """Name and type of each tensor, as ggml numbers the types."""

    @property
    def architecture(self) -> str:
        return str(self.values["general.architecture"])

    @property
    def dtype(self) -> torch.dtype:
        """The type of its weights; float32, which is exact, of quantised ones."""
        types = set(self.tensors.values())
        if not types <= {0, F16, BF16}:
            return torch.float32
        return torch.bfloat16 if BF16 in types else torch.float16 if F16 in types else torch.float32


def find(name: str | Path) -> list[Path] | None:
    """The GGUF file that a model's name means, or its parts in order; None if it is another model.

    name: a file, one of its parts, or a folder that has no other weights.
    Raises InvalidInput for a folder with several files, or if a part is missing.
    """
    path = Path(name)
    if path.is_dir():
        files = sorted(path.iterdir())
        if any(next(path.glob(pattern), None) for pattern in WEIGHTS):
            return None
    elif path.is_file() and PART.fullmatch(path.name):
        files = [each for each in path.parent.iterdir() if _whole(each) == _whole(path)]
    elif path.name.endswith(SUFFIX):
        if not path.is_file():
            raise InvalidInput(f"there is no GGUF file {path}: give its path, or the folder that it is in")
        files = [path]
    else:
        return None
    found = {_whole(each) for each in files} - {None}
    if len(found) > 1:
        one = path / min(map(str, found))
        raise InvalidInput(f"{path} has {len(found)} GGUF files: name one, such as {one}")
    return _in_order([each for each in files if _whole(each)]) if found else None


def folder_of(model: str | Path) -> Path:
    """Where what was made for a model lies: in its folder. A GGUF file has one if no other GGUF is in there."""
    path = Path(model)
    if path.is_file() and len({_whole(each) for each in path.parent.iterdir()} - {None}) == 1:
        return path.parent
    return path


def _whole(path: Path) -> str | None:
    """The name of the GGUF file that this one is, or is a part of."""
    part = PART.fullmatch(path.name)
    return part["whole"] if part else path.name if path.name.endswith(SUFFIX) else None


def _in_order(files: list[Path]) -> list[Path]:
    """The file, if it is there in one piece, else its parts. Raises InvalidInput if one is missing or there twice."""
    if whole := [each for each in files if each.name.endswith(SUFFIX)]:
        return whole
    parts = {each: PART.fullmatch(each.name) for each in files}
    order = sorted((int(match["number"]), each) for each, match in parts.items() if match)
    numbers = [number for number, _ in order]
    counts = {int(match["count"]) for match in parts.values() if match and match["count"]}
    first = 1 if counts else min(numbers[0], 1)
    last = first + (max(counts) if counts else len(order)) - 1
    if len(numbers) != last + 1 - first or numbers != list(range(first, last + 1)):
        raise InvalidInput(
            f"{files[0].parent} has the parts {numbers} of {_whole(files[0])} and not all from {first} to {last}: "
            "fetch those that are missing"
        )
    return [each for _, each in order]


def load(files: Sequence[Path], dtype: torch.dtype | None = None) -> tuple[Any, Any]:
    """Model and tokenizer from a GGUF file, or from its parts, which are joined in the temporary folder meanwhile.

    dtype: of the weights; by default what they are in, float32 for quantised ones.
    Raises InvalidInput if a package is missing, CorruptData for a damaged file, and UnsupportedModel for one that
    transformers cannot read.
    """
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise InvalidInput(f"{files[0].name} needs {' and '.join(missing)}: pip install '.[gguf]'")
    with _in_one_piece(files) as path:
        header = read_header(path, str(files[0]))
        check(header, str(files[0]))
        place: dict[str, Any] = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
        options: dict[str, Any] = {"dtype": dtype or header.dtype, "output_loading_info": True}
        if hasattr(transformers, "GgufConfig"):  # it would keep weights packed where it has kernels for that
            options["quantization_config"] = transformers.GgufConfig(dequantize=True)
        loaded: Any
        try:
            with redirect_stderr(io.StringIO()):  # a progress bar of transformers that has no switch
                config = AutoConfig.from_pretrained(**place)  # read anew, it takes as long as the weights
                tokenizer = AutoTokenizer.from_pretrained(**place)
                loaded = AutoModelForCausalLM.from_pretrained(**place, config=config, **options)
        except FOREIGN as error:
            raise UnsupportedModel(
                f"transformers {transformers.__version__} cannot read {files[0]}, of the architecture "
                f"{header.architecture!r} ({type(error).__name__}: {error}): {INSTEAD}"
            ) from error
    model, report = loaded
    if lacking := sorted(report["missing_keys"]):
        raise CorruptData(f"{files[0]} lacks {len(lacking)} tensors, such as {lacking[0]}: fetch the whole file again")
    return model, tokenizer


@contextmanager
def _in_one_piece(files: Sequence[Path]) -> Iterator[Path]:
    """The file by itself in a folder, so that nothing else there is taken for a part of the model."""
    with TemporaryDirectory(prefix="kvcomp-gguf-") as folder:
        path = Path(folder, str(_whole(files[0])))
        if len(files) == 1:
            path.symlink_to(files[0].resolve())
        else:
            with path.open("wb") as whole:
                for each in files:
                    with each.open("rb") as part:
                        shutil.copyfileobj(part, whole, 1 << 24)
        yield path


def check(header: Header, name: str) -> None:
    """Refuse what transformers would read wrongly without a word.

    Raises InvalidInput and UnsupportedModel, and CorruptData for a number of files that is none.
    """
    shards = header.values.get("split.count", 0)
    if not isinstance(shards, int):
        raise CorruptData(f"{name} says that it is one of {shards!r} files: fetch it again")
    if shards > 1:
        raise InvalidInput(
            f"{name} is one of {shards} GGUF files of a model: join them with llama-gguf-split --merge, or {INSTEAD}"
        )
    scaling = header.values.get(f"{header.architecture}.rope.scaling.type", "none")
    factors = next((tensor for tensor in header.tensors if tensor.startswith(("rope_freqs", "rope_factors"))), None)
    if factors or (scaling != "none" and header.architecture != "gpt-oss"):
        what = f"the tensor {factors}" if factors else f"RoPE scaling {scaling!r}"
        raise UnsupportedModel(f"{name} has {what}, which transformers leaves out of a GGUF's model: {INSTEAD}")


def read_header(path: Path, name: str) -> Header:
    """The header of a GGUF file. name: what messages call it.

    Raises CorruptData if it is no GGUF file, its header is not what the format allows, or it ends before its last
    tensor does; UnsupportedModel for another version of the format or an unknown type of tensor.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        if file.read(4) != MAGIC:
            raise CorruptData(f"{name} is no GGUF file: it does not begin with GGUF")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                header, end = _Reader(data).header()
            except (struct.error, UnicodeDecodeError, _DamageError) as error:
                raise CorruptData(f"the header of {name} is damaged ({error}): fetch the file again") from None
    if end > size:
        raise CorruptData(f"{name} has {size} bytes and its tensors end at {end}: fetch the whole file again")
    return header


class _DamageError(Exception):
    """What the format does not allow."""


class _Reader:
    """Goes through a header; no step depends on a count that the file does not have the bytes for."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 4

    def header(self) -> tuple[Header, int]:
        """The header, and where the file's last tensor ends."""
        (version,) = self.take("I")
        if version not in VERSIONS:
            raise UnsupportedModel(f"a GGUF file of version {version}, and {VERSIONS} can be read: {INSTEAD}")
        tensors, values = self.take("QQ")
        found = {}
        for _ in range(values):
            key = self.string()
            value = self.value(self.take("I")[0])
            if value is not None:
                found[key] = value
        if not isinstance(found.get("general.architecture"), str):
            raise _DamageError("it names no architecture")
        types, last = {}, 0
        for _ in range(tensors):
            tensor = self.string()
            shape = self.take(f"{self.limited(self.take('I')[0], 8)}Q")
            types[tensor], offset = self.take("IQ")
            last = max(last, offset + _nbytes(types[tensor], prod(shape), tensor))
        step = found.get("general.alignment", ALIGNMENT)
        if not isinstance(step, int) or step < 1:
            raise _DamageError(f"an alignment of {step}")
        return Header(found, types), -(-self.at // step) * step + last

    def take(self, kinds: str) -> tuple[Any, ...]:
        found = struct.unpack_from(f"<{kinds}", self.data, self.at)
        self.at += struct.calcsize(f"<{kinds}")
        return found

    def limited(self, count: int, most: int | None = None) -> int:
        """A count of things of at least a byte each."""
        if count > (len(self.data) - self.at if most is None else most):
            raise _DamageError(f"{count} of something at byte {self.at}")
        return count

    def string(self) -> str:
        length = self.limited(self.take("Q")[0])
        found = self.data[self.at : self.at + length].decode("utf-8")
        self.at += length
        return found

    def value(self, kind: int) -> Any:
        """A value of this type; None for an array, which is passed over."""
        if kind in SCALARS:
            return self.take(SCALARS[kind])[0]
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            raise _DamageError(f"a value of the unknown type {kind} at byte {self.at}")
        of, count = self.take("IQ")
        self.limited(count)
        if of in SCALARS:
            self.at += self.limited(count * struct.calcsize(SCALARS[of]))
        elif of == STRING:
            for _ in range(count):
                self.at += self.limited(struct.unpack_from("<Q", self.data, self.at)[0]) + 8
        else:
            raise _DamageError(f"an array of the type {of} at byte {self.at}")
        return None


def _nbytes(kind: int, values: int, tensor: str) -> int:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    except (ValueError, KeyError):
        raise UnsupportedModel(
            f"the tensor {tensor} is of the type {kind}, unknown to this gguf: pip install --upgrade gguf, or {INSTEAD}"
        ) from None
    return int(values // block * size)
