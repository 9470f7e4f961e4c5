"""The command line: ``swincupy classify | embed | convert | inspect | models | bench | tune | doctor``.

Results go to standard output, all else to standard error. Exit codes: 0 done, 1 something failed,
2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import argparse
import glob
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swincupy.errors import InputError, SwincupyError

if TYPE_CHECKING:
    from swincupy import Prediction, SwinTransformer
    from swincupy.config import SwinConfig

#: Files of a folder that are taken for images.
SUFFIXES = (
    *(".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm"),
    *(".png", ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    parser = _parser()
    args = parser.parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # names of files that the terminal cannot show
    try:
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("swincupy: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has had enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (SwincupyError, OSError, MemoryError) as error:
        if args.debug:
            raise
        _complain(f"error: {error or type(error).__name__}")
        return 1


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    as_json = argparse.ArgumentParser(add_help=False)
    as_json.add_argument("--json", action="store_true", help="print JSON for programs")
    model = argparse.ArgumentParser(add_help=False)
    model.add_argument("--model", default="demo", help="file, folder or published name (default: %(default)s)")
    model.add_argument("--preset", choices=("timm", "ms", "hf", "torchvision"), help="preprocessing of another source")
    device = '"cpu", "cuda" or "cuda:N" (default: a GPU where one can be used, else the CPU; see `swincupy doctor`)'
    model.add_argument("--device", help=device)
    model.add_argument("--precision", default="fp32", help="(default: %(default)s)")
    model.add_argument("--batch-size", type=_positive, default=16, metavar="N", help="(default: %(default)s)")

    parser = argparse.ArgumentParser(prog="swincupy", description="Swin Transformers over plain arrays.")
    parser.add_argument("--version", action=_Version)
    commands = parser.add_subparsers(required=True, metavar="command")

    def command(name: str, run: Any, help: str, *parents: argparse.ArgumentParser) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help, parents=[common, *parents])
        sub.set_defaults(run=run)
        return sub

    sub = command("classify", _classify, "name what is in images", model, as_json)
    sub.add_argument("images", nargs="+", help="files, folders or patterns")
    sub.add_argument("--topk", type=_positive, default=5, metavar="K", help="classes per image (default: %(default)s)")
    sub.add_argument("--recursive", action="store_true", help="also folders in folders")

    sub = command("embed", _embed, "write one vector per image to a file", model)
    sub.add_argument(
        "images",
        nargs="+",
        help='files, folders, patterns, or .txt lists of files, one on a line ("-": standard input)',
    )
    sub.add_argument("-o", "--output", type=Path, required=True, help="file to write, .npy or .safetensors")
    sub.add_argument("--normalize", action="store_true", help="vectors of length 1")
    sub.add_argument("--resume", action="store_true", help="go on where an interrupted run stopped")
    sub.add_argument("--skip-bad", action="store_true", help="leave out images that cannot be read")
    sub.add_argument("--recursive", action="store_true", help="also folders in folders")

    sub = command("convert", _convert, "write a checkpoint of any layout as canonical safetensors")
    sub.add_argument("source", help="file, folder or published name")
    sub.add_argument("target", type=Path, help=".safetensors file to write")
    which = sub.add_mutually_exclusive_group()
    which.add_argument("--name", help="published architecture that the source is, where its arrays do not tell")
    which.add_argument("--config", type=Path, help="JSON file with SwinConfig's fields, for the same purpose")

    sub = command("inspect", _inspect, "say what a checkpoint holds, without loading its arrays", as_json)
    sub.add_argument("file", help="file, folder or published name")
    sub.add_argument("--check", action="store_true", help="read the arrays too, and look for NaN and infinity")

    sub = command("bench", _bench, "time models with random weights, in batches and precisions")
    sub.add_argument("--model", nargs="+", default=["swin_tiny"], help="architectures, or files (default: swin_tiny)")
    sub.add_argument("--batch", nargs="+", type=_positive, default=[1, 8, 32], help="(default: 1 8 32)")
    sub.add_argument("--precision", nargs="+", help="(default: fp16 on a GPU, fp32 on the CPU)")
    sub.add_argument("--device", help=device)
    sub.add_argument(
        "--img-size", type=_size, metavar="PIXELS", help="one number, or HEIGHTxWIDTH (default: the model's)"
    )
    sub.add_argument("--repeats", type=_positive, default=50, metavar="N", help="timed calls (default: %(default)s)")
    sub.add_argument("--check", action="store_true", help="compare with float64 on the CPU first; time nothing wrong")
    sub.add_argument("--kernels", action="store_true", help="one forward pass, call by call, instead of the table")
    sub.add_argument("--csv", type=Path, metavar="FILE", help="write the rows there")
    sub.add_argument("--markdown", type=Path, metavar="FILE", help="write the table there")

    sub = command("tune", _tune, "find the fastest matrix products for a model, for all models loaded from then on")
    sub.add_argument("arguments", nargs="*", metavar="BATCH IMAGE WINDOW HEADS SIZE_PER_HEAD DTYPE INT8",
                     help="the seven numbers of FasterTransformer's swin_gemm, instead of the options")  # fmt: skip
    sub.add_argument("--model", help="architecture, or file (default: swin_tiny)")
    sub.add_argument("--batch", type=_positive, help="(default: 1)")
    sub.add_argument("--precision", help="fp32, tf32, fp16 or bf16 (default: fp16)")
    sub.add_argument(
        "--img-size", type=_size, metavar="PIXELS", help="one number, or HEIGHTxWIDTH (default: the model's)"
    )

    command("models", _models, "list the published checkpoints", as_json)
    command("doctor", _doctor, "say what is installed, what will be used, and whether it works", as_json)
    return parser


class _Version(argparse.Action):
    """``--version``, asking for the version only when it is wanted."""

    def __init__(self, option_strings: Sequence[str], dest: str) -> None:
        super().__init__(option_strings, dest, nargs=0, help="print the version")

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from swincupy import __version__

        print(f"swincupy {__version__}")
        parser.exit()


# ------------------------------------------------------------------ classify


def _classify(args: argparse.Namespace) -> int:
    from swincupy.preprocess import stream

    paths = find_images(args.images, recursive=args.recursive)
    model = _load(args)
    bad: dict[int, str] = {}
    batches = stream(
        paths, model.preprocess, args.batch_size, on_error=lambda i, e: bad.update({i: str(e)}), normalise=False
    )
    found = (prediction for batch in batches for prediction in model.classify(batch, args.topk, resize=False))
    report = []
    # stream leaves bad images out: ask for predictions first, then walk the paths that are known to be done
    done = 0
    for predictions in found:
        while done in bad:
            report.append(_show(paths[done], bad[done], args.json))
            done += 1
        report.append(_show(paths[done], predictions, args.json))
        done += 1
    for i in range(done, len(paths)):
        report.append(_show(paths[i], bad[i], args.json))
    if args.json:
        print(json.dumps(report, indent=2))
    return 1 if bad else 0


def _show(path: str, result: list[Prediction] | str, as_json: bool) -> dict[str, Any]:
    """One image's predictions, or its error, as text now or as a JSON value for later."""
    if isinstance(result, str):
        _complain(f"error: {result}")
        return {"image": path, "error": result}
    if not as_json:
        print(path)
        for p in result:
            print(f"  {100 * p.score:6.2f} %  {p.label}")
    return {"image": path, "predictions": [p._asdict() for p in result]}


# --------------------------------------------------------------------- embed


def _embed(args: argparse.Namespace) -> int:
    from swincupy.journal import Journal, check_output

    check_output(args.output)
    paths = find_images(args.images, recursive=args.recursive, lists=True)
    if args.output.suffix == ".npy" and (odd := [p for p in paths if "\n" in p or "\r" in p]):
        raise InputError(f"embed: names must be of one line to be listed beside a .npy file, got {odd[0]!r}")
    model = _load(args)
    job = {
        "swincupy": "embeddings",
        "model": _fingerprint(args.model),
        "preprocess": model.preprocess.to_dict(),
        "precision": model.precision,
        "normalize": args.normalize,
    }
    journal = Journal(args.output, job, model.config.num_features, resume=args.resume)
    try:
        bad = _fill(journal, paths, model, args)
        good = [p for p in paths if p in journal]
        if not good:
            raise InputError(f"embed: images must hold one that can be read, got {len(paths)} that cannot")
        journal.finish(good, {"model": str(args.model), "normalize": json.dumps(args.normalize)})
    except BaseException:
        journal.close()
        if len(journal):
            _complain(f"{len(journal)} finished embeddings are kept in {journal.path}; continue with --resume")
        raise
    left_out = f", {bad} left out" if bad else ""
    _complain(f"wrote {len(good)} embeddings of length {model.config.num_features} to {args.output}{left_out}")
    return 0


def _fill(journal: Any, paths: list[str], model: SwinTransformer, args: argparse.Namespace) -> int:
    """Embed the images that the journal lacks; the number of bad ones, or the error of the first."""
    from tqdm import tqdm

    from swincupy.preprocess import stream

    todo = [p for p in dict.fromkeys(paths) if p not in journal]
    bad: set[int] = set()
    # disable=None: no bar where standard error is not a terminal
    bar = tqdm(total=len(paths), initial=len(paths) - len(todo), unit="image", file=sys.stderr, disable=None)

    def report(index: int, error: InputError) -> None:
        if not args.skip_bad:
            raise InputError(f"{error}; --skip-bad leaves such images out")
        bad.add(index)
        bar.clear()
        _complain(f"skipped: {error}")
        bar.update()

    done = 0
    with bar:
        for batch in stream(todo, model.preprocess, args.batch_size, on_error=report, normalise=False):
            rows = model.embed(batch, normalize=args.normalize, batch_size=args.batch_size, resize=False)
            names: list[str] = []
            while len(names) < len(rows):
                if done not in bad:
                    names.append(todo[done])
                done += 1
            journal.add(names, rows)
            bar.update(len(names))
    return len(bad)


def _fingerprint(source: str) -> list[Any]:
    """What tells one version of a model's files from another without reading them."""
    path = Path(_path(source))
    files = sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]
    return [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in files]


# ------------------------------------------------------- convert and inspect


def _convert(args: argparse.Namespace) -> int:
    import swincupy

    if args.target.suffix != ".safetensors":
        raise InputError(f"convert: target must end in .safetensors, got {args.target}")
    config: SwinConfig | None = None
    if args.name:
        from swincupy.registry import named_config

        config = named_config(args.name)
    elif args.config:
        try:
            config = swincupy.SwinConfig.from_dict(json.loads(args.config.read_text(encoding="utf-8")))
        except (ValueError, TypeError, AttributeError) as error:
            raise InputError(f"convert: {args.config} must hold SwinConfig's fields as JSON; {error}") from error
    model = swincupy.load(args.source, device="cpu", config=config)
    model.save(args.target)
    _complain(f"wrote {args.target}: {model.num_parameters:,} parameters, from {model.layout} layout")
    return 0


def _inspect(args: argparse.Namespace) -> int:
    from swincupy.checkpoint import inspect_checkpoint

    found = inspect_checkpoint(_path(args.file), check_values=args.check)
    broken = found.get("non_finite", [])
    if args.json:
        print(json.dumps(found, indent=2))
        return 1 if found["problem"] or broken else 0
    print(f"format      {found['format']}")
    print(f"layout      {found['layout'] or 'unknown'}")
    print(f"parameters  {found['parameters']:,}")
    print(f"labels      {found['labels'] or 'none'}")
    print("config" if found["config"] else "config      unknown")
    for name, value in (found["config"] or {}).items():
        print(f"  {name:<24}{json.dumps(value)}")
    print(f"tensors     {len(found['tensors'])}")
    width = max((len(t["name"]) for t in found["tensors"]), default=0)
    for t in found["tensors"]:
        values = f"  {t['nan']} NaN, {t['inf']} infinite" if t["name"] in broken else ""
        print(f"  {t['name']:<{width}}  {t['dtype']:<9} {' x '.join(map(str, t['shape'])) or 'scalar'}{values}")
    if found["ignored"]:
        print(f"ignored     {', '.join(found['ignored'])}")
    if args.check and not broken:
        print("values      all finite")
    if found["problem"]:
        _complain(f"problem: {found['problem']}")
    if broken:
        _complain(f"problem: NaN or infinite values in {', '.join(broken)}")
    return 1 if found["problem"] or broken else 0


# ------------------------------------------------------------ bench and tune


def _bench(args: argparse.Namespace) -> int:
    from swincupy import bench
    from swincupy.backend import backend

    precisions = args.precision
    if precisions is None:
        precisions = ["fp32"] if backend(args.device, "fp32").device == "cpu" else ["fp16"]
    device = backend(args.device, precisions[0]).device
    made_on = bench.where(device)
    _complain(", ".join(f"{k} {v}" for k, v in made_on.items()))
    if args.kernels:
        if len(args.model) * len(args.batch) * len(precisions) > 1:
            raise InputError("bench: --kernels must be of one model, batch and precision; name one of each")
        rows: list[Any] = list(bench.kernels(args.model[0], args.batch[0], precisions[0], device, args.img_size))
    else:
        rows = []
        measured = bench.run(
            args.model, args.batch, precisions, device, args.img_size, check=args.check, repeats=args.repeats
        )
        for row in measured:
            _complain(" ".join(map(bench.show, row)))
            rows.append(row)
    table = bench.markdown(rows, made_on)
    print(table, end="")
    if args.csv:
        bench.write_csv(args.csv, rows, made_on)
    if args.markdown:
        args.markdown.write_text(table, encoding="utf-8")
    return 0


def _tune(args: argparse.Namespace) -> int:
    from swincupy import tune

    given = (args.model, args.batch, args.precision, args.img_size)
    if args.arguments:
        if any(option is not None for option in given):
            raise InputError("tune: the seven numbers say everything; leave --model, --batch and the others out")
        if len(args.arguments) != 7:
            raise InputError(
                f"tune: arguments must be the seven numbers BATCH IMAGE WINDOW HEADS SIZE_PER_HEAD DTYPE INT8, "
                f"got {len(args.arguments)}"
            )
        config, batch, precision = tune.positional(args.arguments)
        tune.main(config, batch, precision)
        return 0
    tune.main(_config(args.model or "swin_tiny"), args.batch or 1, args.precision or "fp16", args.img_size)
    return 0


def _config(model: str) -> SwinConfig:
    """The configuration of a file, of the demo model, or of a published architecture."""
    from swincupy import registry
    from swincupy.checkpoint import inspect_checkpoint
    from swincupy.config import SwinConfig

    if not os.path.exists(model):
        return registry.named_config(model)
    found = inspect_checkpoint(model)
    if found["config"] is None:
        raise InputError(f"tune: {model} must tell its configuration, got: {found['problem']}")
    return SwinConfig.from_dict(found["config"])


# --------------------------------------------------------- models and doctor


def _models(args: argparse.Namespace) -> int:
    import dataclasses

    from swincupy import registry

    entries = [registry.entry(name) for name in registry.names()]
    if args.json:
        print(json.dumps([dataclasses.asdict(e) for e in entries], indent=2))
        return 0
    width = max(len(e.name) for e in entries)
    print(f"{'name':<{width}}  image  classes  top-1 %  licence")
    for e in entries:
        image = registry.CONFIGS[e.architecture].img_size if e.architecture else "-"
        top1 = "-" if e.top1 is None else f"{e.top1:.2f}"
        print(f"{e.name:<{width}}  {image:>5}  {e.num_classes:>7}  {top1:>7}  {e.license or 'not stated'}")
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from swincupy.doctor import report

    found = report()
    gpu, check, gpu_check = found["gpu"], found["self_check"], found["gpu_check"]
    ok = check["ok"] and not gpu["broken"] and (gpu_check is None or gpu_check["ok"])
    if args.json:
        print(json.dumps(found, indent=2))
        return 0 if ok else 1
    print(f"swincupy    {found['swincupy']}, Python {found['python']}, {found['platform']}")
    print("packages    " + ", ".join(f"{k} {v or 'not installed'}" for k, v in found["packages"].items()))
    blas = [
        f"{b['internal_api']} {b['version']} ({b['architecture']}, {b['num_threads']} threads)" for b in found["blas"]
    ]
    print(f"BLAS        {', '.join(blas) or 'unknown'}, {found['cpus']} CPUs")
    for d in gpu["devices"]:
        memory = f"{d['memory'] / 2**30:.0f} GiB"
        print(f"GPU         {d['name']}, compute capability {d['compute']}, {memory}, driver {gpu['driver']}")
    if not gpu["usable"]:
        print(f"GPU         {'not used' if gpu['devices'] else 'none'}, models run on the CPU: {gpu['reason']}")
    print(f"used        device {found['used']['device']}, precision {found['used']['precision']}")
    if check["ok"]:
        print(f"self-check  ok: the demo model classified an image in {check['milliseconds']} ms")
    else:
        _complain(f"self-check failed: {check['reason']}")
    if gpu["broken"]:
        _complain(f"GPU cannot be used: {gpu['reason']}")
    if gpu_check is not None and gpu_check["ok"]:
        what = f"{len(gpu_check['checks'])} checks in {', '.join(gpu_check['precisions'])}"
        print(f"GPU check   ok: {what} took {gpu_check['seconds']} s")
    elif gpu_check is not None:
        for failed in (c for c in gpu_check["checks"] if not c["ok"]):
            _complain(f"GPU check failed: {failed['name']}: {failed['reason']}")
    return 0 if ok else 1


# ------------------------------------------------------------------- helpers


def find_images(inputs: Sequence[str], *, recursive: bool = False, lists: bool = False) -> list[str]:
    """Paths of images named on the command line, in order: files as they are, folders and patterns sorted.

    With ``lists``, a ``.txt`` file or ``-`` (standard input) is a list of inputs, one on a line, relative to
    the current folder. A file that is named itself may be missing or no image: reading it will tell.

    Raises
    ------
    InputError
        A folder without images, a pattern that matches nothing, a list that cannot be read.
    """
    return [path for item in inputs for path in _expand(item, recursive, lists)]


def _expand(item: str, recursive: bool, lists: bool) -> Iterator[str]:
    if lists and (item == "-" or item.lower().endswith(".txt")):
        try:
            text = sys.stdin.read() if item == "-" else Path(item).read_text(encoding="utf-8", errors="surrogateescape")
        except OSError as error:
            raise InputError(f"embed: the list {item} cannot be read: {error}") from error
        for line in filter(None, map(str.strip, text.splitlines())):
            yield from _expand(line, recursive, lists=False)
    elif os.path.isdir(item):
        walk = Path(item).rglob("*") if recursive else Path(item).iterdir()
        found = sorted(
            str(p) for p in walk if p.suffix.lower() in SUFFIXES and not p.name.startswith(".") and p.is_file()
        )
        if not found:
            hint = "" if recursive else "; --recursive looks into its folders too"
            raise InputError(f"images: the folder {item} must hold images, found none{hint}")
        yield from found
    elif glob.has_magic(item) and not os.path.exists(item):
        found = sorted(p for p in glob.glob(item, recursive=True) if os.path.isfile(p))
        if not found:
            raise InputError(f"images: the pattern {item} must match files, found none")
        yield from found
    else:
        yield item


def _load(args: argparse.Namespace) -> SwinTransformer:
    import swincupy

    return swincupy.load(args.model, device=args.device, precision=args.precision, preset=args.preset)


def _path(source: str) -> str | Path:
    """A file or folder as it is, a published name as its file."""
    from swincupy import registry

    return source if os.path.exists(source) else registry.fetch(source)


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}")
    return value


def _size(text: str) -> tuple[int, int]:
    """``224`` or ``224x320``."""
    height, _, width = text.partition("x")
    return _positive(height), _positive(width or height)


def _complain(message: str) -> None:
    """One line on standard error."""
    print("swincupy:", " ".join(message.split()), file=sys.stderr)
