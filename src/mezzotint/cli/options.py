"""Options that several commands share, and the layout of --help: options in groups, with readable types.

Help is printed without rich, whose import would double the time that --help takes.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Container, Iterable
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from mezzotint.cli.terminal import set_log_level
from mezzotint.model_options import ModelOptions, parse_config

MODEL = "Model"
PROMPT = "Prompt"
REGIONS = "Regional prompts"
SAMPLING = "Sampling"
GUIDANCE = "Guidance"
FROM_PICTURE = "Picture to picture"
CONTROL = "Control"
HIRES = "Hires"
SDXL = "SDXL"
MEMORY = "Memory"
SAFETY = "Safety checker"
OUTPUT = "Output"
SERVER = "Server"
GROUPS = (
    PROMPT,
    REGIONS,
    MODEL,
    SAMPLING,
    GUIDANCE,
    FROM_PICTURE,
    CONTROL,
    HIRES,
    SDXL,
    MEMORY,
    SAFETY,
    SERVER,
    OUTPUT,
    "Options",
)

# names that other programs have for an option, which --help leaves out
OTHER_NAMES = {
    "--negative": ("--negative-prompt",),
    "--steps": ("--num-inference-steps",),
    "--guidance": ("--guidance-scale", "--cfg-scale", "--cfg"),
    "--strength": ("--denoising-strength",),
}
_HIDDEN = re.compile(rf", ({'|'.join(name for names in OTHER_NAMES.values() for name in names)})(?![\w-])")
FIELDS = {"negative": "negative_prompt", "guidance": "guidance_scale", "syntax": "prompt_syntax"}  # by option
HINTS = {"--width": "--size WxH", "--height": "--size WxH", "--scheduler": "--sampler and --spacing"}


def request_option(option: str) -> str | None:
    """Return how `bulk` spells an option of generate: as a field in --set."""
    from mezzotint.request import Request

    ours = next((name for name, others in OTHER_NAMES.items() if option in others), option)
    name = ours.lstrip("-").replace("-", "_")
    name = FIELDS.get(name, name)
    if name == "size":
        return "--set width=512 --set height=512"
    return f"--set {name}=VALUE" if name in Request.model_fields else None


class Group(TyperGroup):
    """The commands; the beginning of a name is answered with the whole name."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Return the command as typer does, or raise its error with a better suggestion."""
        try:
            return super().resolve_command(ctx, args)
        except Exception as error:
            meant = [name for name in self.commands if name.startswith(args[0])]
            if meant and hasattr(error, "message"):
                error.message = f"No such command {args[0]!r}. Did you mean {' or '.join(map(repr, meant))}?"
            raise


class Command(TyperCommand):
    """A command whose --help lists the options in groups."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the arguments, then the options group by group."""
        sections: dict[str, list[tuple[str, str]]] = {title: [] for title in ("Arguments", *GROUPS)}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is None:
                continue
            if parameter.param_type_name == "argument":
                sections["Arguments"].append((parameter.metavar or record[0], record[1]))
            else:
                panel = getattr(parameter, "rich_help_panel", None) or "Options"
                sections[panel].append((_HIDDEN.sub("", record[0]), record[1]))
        for title, records in sections.items():
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)


def option(
    help: str,
    metavar: str | None = None,
    group: str | None = None,
    *,
    default: str = "",
    name: str = "",
    complete: Callable[[str], Iterable[str]] | None = None,
) -> Any:
    """Return a typer option.

    Args:
        help: What the option does, and its unit.
        metavar: The form of its value, such as WxH; None for a switch.
        group: The heading that --help lists it under.
        default: What --help prints as the default, in words where it depends on the model.
        name: The option's names, separated by spaces, where it has others than that of the parameter.
        complete: Yields what the shell may complete a beginning to.
    """
    text = f"{help}  [default: {default}]" if default else help  # typer would put it into parentheses
    names = [other for one in name.split() for other in (one, *OTHER_NAMES.get(one, ()))]
    return typer.Option(
        *names, help=text, metavar=metavar, rich_help_panel=group, show_default=False, autocompletion=complete
    )


_QUIET = "Print only errors on standard error, and no progress."
_VERBOSE = "Print what is loaded, planned and measured on standard error."
_LOG_LEVEL = "debug, info (as -v), warning or error (as -q)."
Quiet = Annotated[bool, option(_QUIET, name="-q --quiet")]
Verbose = Annotated[bool, option(_VERBOSE, name="-v --verbose")]
LogLevel = Annotated[str | None, option(_LOG_LEVEL, "LEVEL", default="MEZZOTINT_LOG_LEVEL, or warning")]


def complete_sampler(beginning: str) -> list[str]:
    """Return the samplers' names that begin so, except those with spaces, which a shell would split."""
    from mezzotint.samplers import NAMES

    return [name for name in NAMES if name.startswith(beginning) and " " not in name]


def complete_spacing(beginning: str) -> list[str]:
    """Return the spacings' names that begin so."""
    from mezzotint.samplers import SPACINGS

    return [name for name in SPACINGS if name.startswith(beginning)]


Model = Annotated[
    str | None,
    option("Model folder, .safetensors or .ckpt file, or hub id.", "MODEL", MODEL, default="emoji, the bundled model"),
]
Embedding = Annotated[
    list[str] | None,
    option("Textual inversion: file, folder or hub id. The prompt uses it by name. May be repeated.", "PATH", MODEL),
]
Lora = Annotated[
    list[str] | None,
    option(
        "LoRA file or hub id and its scale; TEXT is the scale in the text encoder. May be repeated.",
        "PATH[:SCALE[:TEXT]]",
        MODEL,
        default="scale 1",
    ),
]
Controls = Annotated[
    list[str] | None,
    option(
        "ControlNet or T2I-Adapter (file, folder or hub id) and its conditioning picture. Also: start and end (shares "
        "of the steps), mode (balanced, prompt, control or guess), resize_mode; for a ControlNet Union, type, and "
        "further pictures by more image=. May be repeated.",
        "FILE[:image=FILE,scale=X,...]",
        CONTROL,
        default="image: that of --image; scale 1",
        name="--control",
    ),
]
Refiner = Annotated[
    str | None,
    option("Model that takes the last steps, such as SDXL's refiner: folder, file or hub id.", "MODEL", SDXL),
]
RefinerAt = Annotated[
    float | None,
    option("Share of the timesteps after which it takes over, 0 to 1.", "X", SDXL, default="0.8"),
]
IPAdapters = Annotated[
    list[str] | None,
    option(
        "IP-Adapter (file, folder or hub id) and the picture that it uses as a prompt; for several, repeat image=. "
        "Also: mask (where it acts), encoder (file, folder or hub id), embeds (instead of image), start, end. "
        "May be repeated.",
        "FILE:image=FILE[,scale=X,...]",
        CONTROL,
        default="scale 1; encoder: image_encoder near the file",
        name="--ip-adapter",
    ),
]
Prompt = Annotated[str, typer.Argument(metavar="PROMPT", help="What to draw. - reads standard input.")]
Negative = Annotated[str | None, option("What to keep out of the picture.", "TEXT", PROMPT, name="--negative")]
Syntax = Annotated[
    str | None,
    option("How prompts are written: a1111, comfy, compel or plain.", "SYNTAX", PROMPT, default="a1111"),
]
Size = Annotated[
    str | None,
    option(
        "Width and height in pixels, multiples of 8; one number for a square.",
        "WxH",
        SAMPLING,
        default="the model's native size",
    ),
]
Steps = Annotated[
    int | None,
    option("Number of denoising steps, 1 to 1000.", "N", SAMPLING, default="the model's own, or 50", name="--steps"),
]
Sampler = Annotated[
    str | None,
    option(
        "Sampler; `mezzotint samplers` lists them.",
        "NAME",
        SAMPLING,
        default="the model's scheduler",
        complete=complete_sampler,
    ),
]
Spacing = Annotated[
    str | None,
    option(
        "How noise levels are spaced, such as karras.",
        "NAME",
        SAMPLING,
        default="the sampler's own",
        complete=complete_spacing,
    ),
]
Seed = Annotated[
    int | None,
    option(
        "Seed of the first picture; each further one has the next seed. -1 is a random one.",
        "N",
        SAMPLING,
        default="random",
    ),
]
Count = Annotated[int | None, option("Number of pictures.", "N", SAMPLING, default="1", name="--count -n")]
Batch = Annotated[
    int | None, option("Number of pictures drawn at once.", "N", SAMPLING, default="1 on a CPU, 4 on a GPU")
]
ClipSkip = Annotated[
    int | None, option("Number of text encoder layers to skip from the end.", "N", SAMPLING, default="0")
]
Guidance = Annotated[
    str | None,
    option(
        "Guidance scale; 1 is no guidance. Several numbers are spread over the steps: 9,3 falls from 9 to 3.",
        "SCALE[,SCALE...]",
        GUIDANCE,
        default="the model's own, or 7.5, SDXL 5",
        name="--guidance",
    ),
]
PagScale = Annotated[
    float | None, option("Perturbed-attention guidance: its scale; usually 3.", "SCALE", GUIDANCE, default="off")
]
Region = Annotated[
    list[str] | None,
    option(
        "What is drawn at a place: left, right, top, bottom, a box L,T,R,B of shares from 0 to 1, or the file of a "
        "mask; @2 after it is its weight. With --columns or --rows only the prompt. May be repeated.",
        "PLACE[@WEIGHT]=PROMPT",
        REGIONS,
    ),
]
Columns = Annotated[
    str | None,
    option(
        "Place the regions side by side, by their widths, such as 1,2,1; 1,1,2;3,1,1 is two rows, each with its height "
        "and the widths in it.",
        "RATIOS",
        REGIONS,
    ),
]
Rows = Annotated[str | None, option("The same from top to bottom, with width and height exchanged.", "RATIOS", REGIONS)]
Safety = Annotated[
    str | None,
    option(
        "What is done with pictures that the safety checker flags: off (none is checked), flag (report it), blur or "
        "black.",
        "MODE",
        SAFETY,
        default="flag, if the model has a checker",
    ),
]
_MEMORY = "Memory that the process may use, such as 4GiB; auto is what is free. Offloading and the like make it fit."
Memory = Annotated[str | None, option(_MEMORY, "SIZE|auto", MEMORY, default="no limit")]
MemoryOrAuto = Annotated[str, option(_MEMORY, "SIZE|auto", MEMORY, default="auto")]
Device = Annotated[
    str | None, option("cpu, cuda, cuda:1, mps, ...", "DEVICE", MEMORY, default="the best one available")
]
Dtype = Annotated[
    str | None,
    option(
        "float32, bfloat16, float16 or auto: bfloat16 where the device multiplies it natively.",
        "DTYPE",
        MEMORY,
        default="float32 on a CPU, 16 bits elsewhere",
    ),
]
Json = Annotated[bool, option("Print one JSON object instead of text.", None, OUTPUT, name="--json")]


def model_options(
    prediction: Annotated[
        str | None,
        option("What the UNet predicts: epsilon, v_prediction or sample.", "TYPE", MODEL, default="as its files say"),
    ] = None,
    family: Annotated[
        str | None, option("Family of the model: sd1, sd2 or sdxl.", "FAMILY", MODEL, default="by its tensors")
    ] = None,
    variant: Annotated[
        str | None,
        option("Variant of a model folder's weights, such as fp16.", "NAME", MODEL, default="none, or fp16"),
    ] = None,
    config: Annotated[
        list[str] | None,
        option(
            "Value in the config of unet, vae, text_encoder, text_encoder_2 or scheduler, such as "
            "unet.attention_head_dim=4. May be repeated.",
            "PART.FIELD=VALUE",
            MODEL,
        ),
    ] = None,
    vae: Annotated[
        str | None,
        option("VAE: a file, a folder or a hub id.", "VAE", MODEL, default="the model's own"),
    ] = None,
    safety_checker: Annotated[
        str | None,
        option("Safety checker: a folder or a hub id.", "CHECKER", SAFETY, default="the model's own, if it has one"),
    ] = None,
) -> dict[str, Any]:
    """Return those options of a model that are given, as keyword arguments of `mezzotint.load`.

    A command has these options by `@add_options_of(model_options)`.

    Raises:
        RequestError: If `config` has another form.
        CheckpointError: If an option has a value that it cannot have.
    """
    fields = parse_config(config) if config else None
    given = {
        "prediction": prediction,
        "family": family,
        "variant": variant,
        "config": fields,
        "vae": vae,
        "safety_checker": safety_checker,
    }
    kept: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    ModelOptions(**kept)  # checked before torch is imported
    return kept


def take_model_options(options: dict[str, Any], safety: str | None = None) -> dict[str, Any]:
    """Take the options of `model_options` out of all options of a command.

    With --safety off the model's own safety checker is not loaded, nor downloaded.
    """
    names = inspect.signature(model_options).parameters
    taken = model_options(**{name: options.pop(name) for name in names if name in options})
    return {"safety_checker": None, **taken} if safety == "off" else taken


def add_options_of(
    other: Callable[..., Any], without: Container[str] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorate a command that takes **options so that it has the options of another one, too.

    Args:
        other: The other command.
        without: Its parameters that are left out. Those that the command itself has are left out as well.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        *own, _ = inspect.signature(command, eval_str=True).parameters.values()
        names = {parameter.name for parameter in own}
        theirs = inspect.signature(other, eval_str=True).parameters.values()
        more = [each for each in theirs if each.name not in names and each.name not in without]
        command.__signature__ = inspect.Signature([*own, *more])  # type: ignore[attr-defined]  # typer reads it
        return command

    return decorate


def log_level_of(quiet: Quiet = False, verbose: Verbose = False, log_level: LogLevel = None) -> str | None:
    """Return the log level that the options ask for; None if there are none."""
    return "error" if quiet else "info" if verbose else log_level


def takes_log_level(command: Callable[..., None]) -> Callable[..., None]:
    """Return a command that also takes the options of the log level, as they may stand before it."""
    more = inspect.signature(log_level_of, eval_str=True).parameters

    def run(**options: Any) -> None:
        if level := log_level_of(**{name: options.pop(name) for name in more}):
            set_log_level(level)
        command(**options)

    run.__name__, run.__doc__ = command.__name__, command.__doc__
    theirs = inspect.signature(command, eval_str=True).parameters.values()
    last = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in more.values()]
    run.__signature__ = inspect.Signature([*theirs, *last])  # type: ignore[attr-defined]  # typer reads it
    return run
