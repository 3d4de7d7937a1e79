"""`memory_budget(model, "12GiB")`: the fastest step that fits, without choosing a checkpointing flag.

Activation checkpointing as a flag is all or nothing: 8B at 2 x 4096 tokens takes 36 GiB without and 8 GiB with it, and a third
more time. Between the two lies a ladder (`recompute.LEVELS`): norms computed again cost next to nothing, gate and up are more
than half of what a layer saves for a third of what it costs to compute it again, and what attention needs, saved once, can wait
in host memory while other layers compute. A layer is probed once (`memory_probe`), the plan chooses a level for each layer
(`memory_plan`), and the layers obey (`memory_layers`).

The first step of a size of batch runs on the plan with the lowest peak, and the peak of head and loss is measured in it. From the
second step on the plan is made for what is really there: weights, gradients, optimizer, and the loss's own peak. It is made again
when the optimizer's states appear, when a larger batch comes, and when a step needed more than was predicted.

What is there is looked up before every forward, while the card waits for its first layer. So what can be known before is not
asked there: sizes of parameters, and what others have taken of the card, which is asked in the backward, where the host is ahead.

What is left when nothing is computed again can hold the NF4 weights of compiled layers dense (dense_weights.py). Graphs are traced
with them or without, so it is decided before the first: where a generous estimate of all else leaves the room. A plan that needs
the room later gets it back.

If a step runs out of memory nevertheless (another process took the card's memory, the optimizer allocates more than its usual),
the error is the user's to see: a backward that has run in part cannot be run again. The next step is planned with that much less.
"""

from __future__ import annotations

import logging
import time
import weakref

import torch

from . import dense_weights, memory_amount, memory_layers, memory_probe
from .dense_weights import DenseWeights
from .memory_plan import BudgetTooSmall, Costs, Plan, best, smallest
from .offload import Offloader
from .recompute import LEVELS

logger = logging.getLogger(__name__)
_DENSE_SAVES = 0.02  # of the layers' time: measured for 8B on an H200
_STEP = 8 * 2**20  # memory that was there before the forward is rounded up to this, so that plans are found again


def memory_budget(
    model: torch.nn.Module,
    budget: str | float = "auto",
    *,
    offload: bool = True,
    host_memory: str | float | None = None,
    margin: float | None = None,
    dense_weights: bool = True,
) -> MemoryBudget:
    """Put the training of `model` under a memory budget; any gradient checkpointing of its own is switched off meanwhile.

    model: a causal language model with or without LoRA, on one device a process: transformers, peft, Unsloth's
        `FastLanguageModel`, sharded by DDP or FSDP2 or not. Losses and gradients stay what they are without a budget.
    budget: "auto" (what the card has left), an amount ("12GiB", or 12, in GiB) or a share of the card (0.8, "80%"), for
        everything that PyTorch allocates on the card, weights and optimizer included.
    offload: whether saved tensors may wait in pinned host memory.
    host_memory: how much of it, as an amount or a share of what is free; half of it if None.
    margin: share of the budget that is kept free; 0.02 of an amount and 0.06 of a card if None.
    dense_weights: whether memory that nothing else needs may hold the NF4 weights of compiled layers in 16 bits too. Then sums may be
        in another order than without a budget. Not where FSDP2 shards.

    Returns the MemoryBudget, whose `plan` is there after the first step and whose `remove()` undoes everything. Evaluation and
    generation are not touched. Raises TypeError or ValueError for a bad argument and `UnsupportedModel` for a model without
    decoder layers, before anything is changed; a training forward raises `BudgetTooSmall`, with the least possible budget, if no
    plan fits.

    Selective activation checkpointing is that of Korthikanti et al. (arXiv 2205.05198); the order of the levels follows the
    measured cost of each byte that is freed.
    """
    return MemoryBudget(
        model, budget, offload=offload, host_memory=host_memory, margin=margin, dense_weights=dense_weights
    )


def budget_on(model: torch.nn.Module) -> MemoryBudget | None:
    """The budget that `model` is under, if any."""
    for module in model.modules():
        if (state := memory_layers.state_of(module)) is not None:
            return state.keeper
    return None


class _Pass:
    """One forward of the whole stack: what it sent to the host, by layer, and what was allocated at its ends."""

    def __init__(self, plan: Plan, tokens: int, sequence: int):
        self.plan, self.tokens, self.sequence = plan, tokens, sequence
        self.sent: dict[int, list[weakref.ref]] = {}
        self.late: dict[int, list[weakref.ref]] = {}  # wanted only when `computed` are there
        self.computed: dict[int, list[weakref.ref]] = {}
        self.looked = 0
        self.after_layers = self.peak_before = 0
        self.measuring = False


class MemoryBudget:
    """The plans of one model. Made by `memory_budget`."""

    def __init__(self, model, budget, *, offload=True, host_memory=None, margin=None, dense_weights=True):
        self.budget = memory_amount.parse(budget)
        if margin is not None and not 0 <= margin < 1:
            raise ValueError(f"margin must be at least 0 and less than 1, got {margin!r}")
        host = None if host_memory is None else memory_amount.parse(host_memory)
        _, layers = memory_layers.decoder_layers(model)
        device = next((p.device for p in layers[0].parameters() if p.device.type != "meta"), torch.device("cpu"))
        others = {p.device for layer in layers for p in layer.parameters()} - {device}
        if others:
            raise memory_layers.UnsupportedModel(
                f"the decoder layers are on several devices ({device}, {', '.join(map(str, others))}); a budget is for one"
            )
        self.model, self.margin, self.given, self.device = weakref.ref(model), margin, budget, device
        self.meter = memory_amount.meter(device, model)
        self.offloader = Offloader(device) if offload else None
        kind, amount = host or ("share", 0.5)
        self.host_memory = int(amount * memory_amount.host_memory_free() if kind == "share" else amount)
        self.trainable = [p for p in model.parameters() if p.requires_grad]
        self._elements, self._gradient_bytes = 0, []  # of the trainable parameters; found where a layer is probed
        self.scripts: dict = {}
        self.patterns: dict = {}  # kind of layer -> (the first script found in one, how often was searched)
        # For reports: seconds of finding out what is saved, of these the searches' count, of probing and of planning.
        self.looking = self.probing = self.planning = 0.0
        self.searches = 0
        self.costs: Costs | None = None
        self.loss_bytes: float | None = None  # of head and loss, for each token
        self.correction = 0  # bytes by which a step exceeded its prediction
        self.stepped = False  # whether an optimizer of these parameters has made its states
        self.plan: Plan | None = None
        self.dense: DenseWeights | None = None
        self._may_be_dense = dense_weights
        self._plans: dict = {}
        self._pass: _Pass | None = None
        self._counts = self.meter.counts()  # at the start of the last forward
        self._failures = self._counts.failures
        self.states = memory_layers.install(self, model)
        self._last = len(self.states) - 1
        self._flags = self._checkpointing(model)
        self._hooks = [memory_layers.stack_of(model).register_forward_pre_hook(_clear), _after_optimizer_steps(self)]

    # -- other checkpointing -------------------------------------------------------------------------------------------------

    @staticmethod
    def _checkpointing(model) -> dict:
        """Instance flags, off now, by module: transformers' and Unsloth's checkpointing ask `module.gradient_checkpointing`."""
        flags = {}
        for module in model.modules():
            if "gradient_checkpointing" in module.__dict__:
                flags[module] = module.__dict__["gradient_checkpointing"]
                module.gradient_checkpointing = False
        return flags

    def clear_checkpointing(self, stack: torch.nn.Module) -> None:
        """Trainer and Unsloth's for_training() switch it on again at any time; the stack asks when its forward begins."""
        for part in (stack, *stack.layers) if hasattr(stack, "layers") else (stack, *stack.children()):
            if getattr(part, "gradient_checkpointing", False):
                self._flags[part] = part.gradient_checkpointing
                part.gradient_checkpointing = False

    def remove(self) -> None:
        """Take the budget off: forwards and checkpointing flags are again what they were. Call it between steps."""
        model = self.model()
        self._without_dense()
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if model is not None:
            memory_layers.uninstall(model)
            for module, value in self._flags.items():
                module.gradient_checkpointing = value
        self._flags = {}
        if self.offloader is not None:
            self.offloader.memory.clear()

    # -- planning ------------------------------------------------------------------------------------------------------------

    def limit(self) -> int:
        """Bytes that may be allocated now."""
        return self.meter.limit(self.budget, self.margin)

    def _static(self) -> int:
        """What is allocated at the start of a forward, and what the step will add that no plan can change."""
        sizes = zip(self._gradient_bytes, self.trainable, strict=True)
        return self._counts.allocated + sum([size for size, p in sizes if p.grad is None])

    def _wished(self) -> int:
        """The limit that a plan is chosen by: room is left for the states of an optimizer that has not stepped, Adam's in fp32."""
        return self.limit() - (0 if self.stepped else 8 * self._elements)

    def _begin(self, state, layer, inner, args, kwargs) -> _Pass:
        x = memory_layers.hidden_states(args, kwargs)
        tokens, sequence = x.numel() // x.shape[-1], x.shape[-2]
        if self.offloader is not None:
            self.offloader.drain()  # of a forward that no backward followed
        self._counts = self.meter.counts()
        if self._counts.failures > self._failures:
            self.meter.look()
            if not self._without_dense():
                self.correction += max(2**28, self.limit() // 20)
            self._plans.clear()
        if self._may_be_dense and self.costs is None:
            self._keep_dense(layer, tokens)
        elif self.dense is not None and not self.dense.is_current():
            self._without_dense()
        if self.costs is None or tokens > self.costs.tokens * 1.25 or sequence > self.costs.sequence * 1.25:
            self._probe(state, layer, inner, args, kwargs, 3 if x.is_cuda else 1)
            self._counts = self.meter.counts()
        self._failures = self._counts.failures  # the probe's own, at levels that do not fit, are no step's
        start = time.perf_counter()
        try:
            plan = self._planned(tokens, sequence)
        except BudgetTooSmall:
            if not self._without_dense():
                raise
            return self._begin(state, layer, inner, args, kwargs)
        self.planning += time.perf_counter() - start
        saved = _DENSE_SAVES * len(self.states) * (self.costs.forward + self.costs.backward)
        if plan.extra > saved and self._is_measured() and self._without_dense():  # activations first: they buy more
            return self._begin(state, layer, inner, args, kwargs)
        if plan is not self.plan:
            if plan != self.plan:
                logger.info("memory budget %s: %s", self.given, plan)
            self.plan = plan
            for one, name in zip(self.states, plan.levels, strict=True):
                one.level = LEVELS[name]
        started = _Pass(plan, tokens, sequence)
        started.measuring = self.loss_bytes is None and self.device.type == "cuda"
        started.peak_before = self._counts.peak
        started.looked = sum([one.looked for one in self.states])
        return started

    def _keep_dense(self, layer, tokens: int) -> None:
        """Keep the weights dense, if layers are compiled and it leaves the room that everything else could want."""
        self._may_be_dense = False
        model = self.model()
        compiled = "_unsloth_ext_compiled" in model.__dict__ or hasattr(type(layer).forward, "_unsloth_block_original")
        if not compiled or not (wanted := dense_weights.bytes_wanted(model)):
            return
        elements = sum(p.numel() for p in self.trainable)
        else_at_most = dense_weights.activations_at_most(model, tokens) + dense_weights.loss_at_most(model, tokens)
        else_at_most += 16 * elements  # gradients and optimizer in fp32
        if self._counts.allocated + wanted + else_at_most > self.limit():
            return
        try:
            self.dense = dense_weights.keep_dense_weights(model)
        except torch.OutOfMemoryError:  # another process has taken it meanwhile
            return
        self._counts = self.meter.counts()
        logger.info("memory budget %s: %.2f GiB of weights are kept dense", self.given, self.dense.nbytes / 2**30)

    def _without_dense(self) -> bool:
        """Give their memory back; what was measured and found with them counts no more. False if there were none."""
        if self.dense is None:
            return False
        self.dense.remove()
        self.dense = self.costs = None
        self.scripts.clear()
        self.patterns.clear()
        self._plans.clear()
        return True

    def _probe(self, state, layer, inner, args, kwargs, repeat: int) -> None:
        start = time.perf_counter()
        self._elements = sum(p.numel() for p in self.trainable)
        self._gradient_bytes = [p.numel() * p.element_size() for p in self.trainable]
        self.costs = memory_probe.measure(
            state, layer, inner, args, kwargs, self.scripts, self.meter, self.offloader, repeat
        )
        self.probing += time.perf_counter() - start
        logger.info(
            "memory budget %s: a layer probed in %.1f s, %.1f s of it to find what it saves",
            self.given,
            self.probing,
            self.looking,
        )
        self.loss_bytes = None
        self._plans.clear()

    def _is_measured(self) -> bool:
        """Whether head and loss have been seen; before, the plan is the smallest, whatever there is."""
        return self.loss_bytes is not None or self.device.type != "cuda"

    def _planned(self, tokens: int, sequence: int) -> Plan:
        static = -(-self._static() // _STEP) * _STEP if self.device.type == "cuda" else self._static()
        limit, measured = self._wished(), self._is_measured()
        key = (tokens, sequence, static, limit // _STEP, measured, self.correction)
        if key not in self._plans:
            costs = self.costs.scaled(tokens, sequence)
            known = dict(
                static=static + self.correction,
                loss=int((self.loss_bytes or 0) * tokens),
                host_memory=self.host_memory if self.offloader is not None else 0,
            )
            plan = smallest(costs, len(self.states), **known)
            if plan.peak <= limit:
                if measured:
                    plan = best(costs, len(self.states), limit, **known)
            elif plan.peak - self.correction > (all_of_it := self.meter.limit(self.budget, 0.0)):
                # A margin, or what is kept for an optimizer that may need less, makes no budget impossible.
                best(costs, len(self.states), all_of_it, **known)  # raises
            elif plan.peak > all_of_it:
                # What earlier steps took beyond their predictions is no reason to end a run that is going on.
                logger.warning(
                    "memory budget %s: steps took %.2f GiB more than predicted, and with that much less no plan fits; the "
                    "smallest one is used, and the budget may be exceeded",
                    self.given,
                    self.correction / 2**30,
                )
            if len(self._plans) >= 1024:  # batches of ever new lengths
                self._plans.clear()
            self._plans[key] = plan
        return self._plans[key]

    # -- a step --------------------------------------------------------------------------------------------------------------

    def run(self, state, layer, inner, args, kwargs):
        """One layer's training forward, called by its wrapper."""
        state.outside = True
        if state.index == 0:
            self._pass = self._begin(state, layer, inner, args, kwargs)
        current = self._pass
        if current is None:  # a layer called by itself
            return inner(*args, **kwargs)
        out, frame = memory_layers.run_layer(state, layer, inner, args, kwargs, state.level, self.scripts)
        if self.offloader is not None:
            self.offloader.drain()  # what the layer before has sent
        if frame is not None:
            lists = current.sent.setdefault(state.index, []), current.late.setdefault(state.index, [])

            def send(value, late):
                self.offloader.send(value)
                lists[late].append(weakref.ref(value))

            current.computed[state.index] = memory_layers.settle(state, layer, frame, state.level, self.scripts, send)
        tensor = out[0] if isinstance(out, (tuple, list)) else out
        if tensor.requires_grad and (current.sent or state.index in (0, self._last)):
            tensor.register_hook(lambda gradient, index=state.index: self._reached(current, index))
        if state.index == self._last and current.measuring:
            current.after_layers = self.meter.allocated()
            self.meter.reset_peak()
        return out

    def _reached(self, current: _Pass, index: int) -> None:
        """The backward has come to layer `index`: bring back what it still lacks and what the layer before it will want."""
        if index == self._last and current.measuring:
            current.measuring = False
            self.loss_bytes = (self.meter.peak() - current.after_layers) / current.tokens
            self._plans.clear()
        for refs in (current.sent.get(index), current.late.get(index), current.sent.get(index - 1)):
            for ref in refs or ():
                value = ref()
                if value is not None and value.restored is None and not self.offloader.call_off(value):
                    self.offloader.fetch(value)
        if current.late.get(index):
            # Autograd reads what a layer saved in its own order: the products first, while the copies are under way.
            for ref in current.computed[index]:
                if (value := ref()) is not None:
                    value.get()
        if index == 0 and self.device.type == "cuda":
            self.meter.look()  # for the next step
            peak = self.meter.peak()
            over = peak - current.plan.peak
            examined = sum(one.looked for one in self.states) - current.looked  # takes memory, and is done with
            if peak > current.peak_before and over > 0 and not examined:
                self.correction += -(-over // _STEP) * _STEP
                self._plans.clear()

    def __repr__(self):
        return f"MemoryBudget({self.given!r}: {self.plan or 'planned at the first training step'})"


def _clear(stack, args):
    # No method of the keeper: a copied model copies its hooks, and a copy is under no budget.
    state = memory_layers.state_of(stack)
    if state is not None and stack.training and not torch.compiler.is_compiling():
        state.keeper.clear_checkpointing(stack)


def _after_optimizer_steps(keeper: MemoryBudget):
    """After the first step of an optimizer that trains these parameters, its states are part of what is allocated."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    ref = weakref.ref(keeper)

    def hook(optimizer, args, kwargs):
        me = ref()
        if me is None or me.stepped:
            return
        mine = {id(p) for p in me.trainable}
        me.stepped = any(id(p) in mine for group in optimizer.param_groups for p in group["params"])
        if me.stepped:
            me.meter.look()  # some optimizers allocate beside PyTorch

    return register_optimizer_step_post_hook(hook)
