"""The model of a run: its shape, engine options and memory, from the run's options."""

from __future__ import annotations

from dataclasses import replace

from gptc.checkpoint.facade import Model
from gptc.checkpoint.reader import Checkpoint
from gptc.data.dataset import Dataset
from gptc.engine import library
from gptc.engine.config import GPTConfig
from gptc.engine.lora import Lora, targets_named
from gptc.engine.options import BlockRows, Options, Plan, plan_for
from gptc.errors import EngineError, GptcError, UsageError
from gptc.files.memory import available_bytes
from gptc.files.words import amount, plural
from gptc.formats.model_file import ModelFile
from gptc.training.defaults import default_alpha, defaults_for
from gptc.training.fitting import what_fits
from gptc.training.options import SHAPE, TrainOptions
from gptc.training.progress import Progress


def shape_of(options: TrainOptions, known: ModelFile | None, dataset: Dataset) -> GPTConfig:
    if known is not None:
        return known.config
    changed = {name: getattr(options, name) for name in SHAPE}
    config = GPTConfig.preset(
        options.preset,
        vocab_size=dataset.vocab_size,
        block_size=options.seq_len,
        **{name: value for name, value in changed.items() if value is not None},
    )
    config.check()
    return config


def fit_context(options: TrainOptions, config: GPTConfig, show: Progress) -> TrainOptions:
    """Lowers --seq-len to the model's context."""
    if options.seq_len <= config.block_size:
        return options
    if options.seq_len != defaults_for("init-from")["seq_len"]:  # given explicitly
        show.note(f"note: --seq-len is lowered to the model's context of {config.block_size}")
    return replace(options, seq_len=config.block_size)


def fill_step(options: TrainOptions) -> TrainOptions:
    """Sets --grad-accum by --tokens-per-step."""
    wanted, pass_tokens = options.tokens_per_step, options.rows * options.seq_len
    if wanted is None:
        return options
    if wanted < pass_tokens:
        raise UsageError(
            f"--tokens-per-step is {wanted}; a micro-batch of {options.rows} x {options.seq_len} "
            f"tokens is more: use --batch-size {max(1, wanted // options.seq_len)} or less"
        )
    filled = replace(options, grad_accum=-(-wanted // pass_tokens), tokens_per_step=None)
    filled.check()
    return filled


def _lora(options: TrainOptions, config: GPTConfig) -> Lora | None:
    """The adapters that the options ask for."""
    rank = options.lora_rank
    if not rank:
        return None
    targets = targets_named(config, options.lora_targets)
    alpha = default_alpha(rank) if options.lora_alpha is None else options.lora_alpha
    return Lora(rank, alpha, targets, options.lora_dropout, options.lora_kind, options.dora)


def _packing(options: TrainOptions, dtype: str, known: ModelFile | None) -> tuple[BlockRows, ...]:
    """The matrices that stay as a quantized file has them while adapters are trained."""
    if not options.lora_rank or known is None or dtype not in ("auto", "packed"):
        return ()
    blocks = known.packing()
    if dtype == "packed" and not blocks:
        raise UsageError(f"{known.path} has no quantized matrices: choose another --dtype")
    return blocks


def model_settings(
    options: TrainOptions,
    base: Checkpoint | None,
    known: ModelFile | None,
    config: GPTConfig,
    part: tuple[int, int],
    ranks: int,
) -> tuple[Options, Plan]:
    """The model's options and memory plan. GptcError if the memory is not available.

    `part` is the number of parts of the optimizer's state, and that of this rank.
    """
    threads, dtype = options.threads, options.dtype
    if base is not None:
        # Bit-for-bit resuming needs the same threads and dtype: the order of sums depends on the
        # number of threads, their rounding on the dtype.
        trainer = base.trainer()
        assert trainer is not None
        threads = threads or min(trainer["threads"], library.cpu_count())
        dtype = trainer["dtype"] if dtype == "auto" else dtype
    if options.recompute_layers > config.n_layer:
        raise UsageError(
            f"--recompute-layers is {options.recompute_layers}; the model has "
            f"{plural(config.n_layer, 'layer')}: use that or less"
        )
    blocks = _packing(options, dtype, known)
    settings = Options(
        options.device,
        "packed" if blocks else dtype,
        threads,
        training=True,
        max_batch=options.rows,
        max_seq=options.seq_len,
        dropout=options.dropout,
        seed=options.seed,
        pin=options.pin,
        blocks=blocks,
        lora=_lora(options, config),
        recompute=options.recompute,
        recompute_layers=options.recompute_layers,
        optimizer=options.optimizer,
        optimizer_dtype=options.optimizer_dtype,
        muon_rows=options.muon_rows,
        label_smoothing=options.label_smoothing,
        z_loss=options.z_loss,
        n_shards=part[0],
        shard=part[1],
        wire=options.wire if ranks > 1 else "fp32",
    ).resolved()
    try:
        plan = plan_for(config, settings)
    except EngineError as error:
        if "n_threads" not in str(error):
            raise
        raise UsageError(str(error).replace("n_threads", "--threads")) from error
    available = available_bytes()
    if settings.device == "cpu" and available is not None and plan.total_bytes > available:
        # Otherwise the kernel would kill the process later, without a message.
        advice = what_fits(options, config, settings, available, base is not None)
        raise GptcError(
            f"training needs {amount(plan.total_bytes)}, but {amount(available)} are free; {advice}"
        )
    return settings, plan


def create_model(
    options: TrainOptions, base: Checkpoint | None, config: GPTConfig, settings: Options
) -> Model:
    try:
        return Model(config, settings)
    except EngineError as error:
        if error.status == library.GPT_ERR_MEMORY:
            gpu = settings.device != "cpu"
            free = library.gpu().free_bytes * 63 // 64 if gpu else available_bytes() or 0
            advice = what_fits(options, config, settings, free, base is not None)
            raise GptcError(f"{error}: {advice}") from error
        raise
