"""The loss of a language-model head, forward and backward: ours beside every way that is used, time and memory; one run.

Two times for each. *Sustained*: calls back to back, the contestants in turn; the card then runs at its power limit and lowers
its clock (1.2 of 1.98 GHz was seen), as it does in training. *After a pause*: one call after a quarter of a second of rest, at
full clock. Claims are on the sustained time.

Memory is the peak above the inputs: the gradients that the call leaves behind are part of it. Errors are relative, against fp32
logits and fp32 sums of the same bf16 inputs. Labels are random, so a prediction is never confident; `spread` is the standard
deviation of the logits: 1.3 as in the beginning of a run, or 4 as at its end, where bf16 logits cost precision.

    python benchmarks/bench_loss.py [--quick]
"""

import contextlib
import functools
import gc
import itertools
import os
import sys
import time

import plots
import record
import torch
import torch.nn.functional as F

MAIN = (16384, 4096, 128256)
GRPO = (32768, 4096, 151936)
CHALLENGE = (4 * 4096, 4096, 128 * 1024)
FAST, LEAN, FAST32 = "unsloth_ext, fast", "unsloth_ext, lean", "unsloth_ext, fast, fp32 logits"
GENERIC, FULL, CHECKPOINT = "unsloth_ext, chunked_loss", "full logits", "torch.utils.checkpoint, 1024 rows"
UNSLOTH, LIGER, TRL, CCE, CCE_EXACT = "Unsloth", "Liger", "trl", "Apple CCE", "Apple CCE, no filter"
TORCH, QUACK = "torch.nn.functional.linear_cross_entropy", "QuACK"
OURS = (FAST, LEAN, FAST32, GENERIC)
TRL_COLUMNS = 32768  # what its trainers use
SHAPES = [  # T, D, V, trained, who
    (2048, 2048, 32000, False, None),
    (2048, 2048, 32000, True, None),
    (8192, 2048, 128256, False, None),
    (8192, 2048, 128256, True, None),
    (8192, 4096, 151936, True, (FAST, LEAN, UNSLOTH, LIGER, TRL)),
    (16384, 2048, 262144, False, (FAST, LEAN, UNSLOTH, LIGER, TRL)),
    (8192, 8192, 128256, False, (FAST, LEAN, UNSLOTH, LIGER, TRL)),
    (65536, 4096, 128256, False, (FAST, LEAN, UNSLOTH, LIGER)),
]


def contestants():
    """name -> call(hidden, weight, labels) -> scalar loss."""
    from unsloth_ext.loss.cross_entropy import linear_cross_entropy

    def checkpointed(hidden, weight, labels):
        def part(x, y):
            return F.cross_entropy((x @ weight.t()).float(), y, reduction="sum")

        total = 0.0
        for x, y in zip(hidden.split(1024), labels.split(1024), strict=True):
            total = total + torch.utils.checkpoint.checkpoint(part, x, y, use_reentrant=False)
        return total / len(labels)

    found = {
        FAST: functools.partial(linear_cross_entropy, memory="fast"),
        LEAN: functools.partial(linear_cross_entropy, memory="lean"),
        FAST32: functools.partial(linear_cross_entropy, memory="fast", logits_dtype=torch.float32),
    }
    with contextlib.suppress(ImportError, AttributeError):
        from unsloth_ext.loss import chunked_loss, functions

        cross_entropy = functions.cross_entropy()
        found[GENERIC] = lambda hidden, weight, labels: chunked_loss(cross_entropy, hidden, weight, labels)
    found[FULL] = lambda hidden, weight, labels: F.cross_entropy((hidden @ weight.t()).float(), labels)
    found[CHECKPOINT] = checkpointed
    with contextlib.suppress(ImportError):
        import unsloth  # noqa: F401
        from unsloth_zoo.fused_losses.cross_entropy_loss import unsloth_fused_ce_loss

        found[UNSLOTH] = lambda hidden, weight, labels: unsloth_fused_ce_loss(
            None, hidden[None], weight, None, labels[None], shift_labels=False
        )
    with contextlib.suppress(ImportError):
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        found[LIGER] = liger_fused_linear_cross_entropy
    with contextlib.suppress(ImportError):
        from cut_cross_entropy import linear_cross_entropy as cce

        found[CCE] = cce
        found[CCE_EXACT] = functools.partial(cce, filter_eps=None)
    with contextlib.suppress(ImportError):
        from trl.kernels import ChunkedLogProbFunction

        found[TRL] = lambda hidden, weight, labels: -ChunkedLogProbFunction.apply(
            hidden, weight, None, labels, 1.0, TRL_COLUMNS, None, 1.0, ()
        )[0].mean()
    if hasattr(F, "linear_cross_entropy"):
        found[TORCH] = F.linear_cross_entropy
    with contextlib.suppress(ImportError):
        from quack.linear_cross_entropy import chunked_linear_cross_entropy

        found[QUACK] = lambda hidden, weight, labels: chunked_linear_cross_entropy(hidden, weight, labels)
    return found


def grpo_contestants():
    """name -> call(hidden, weight, labels) -> (log-probabilities, entropies)."""
    from unsloth_ext.loss.logprobs import linear_logprobs

    found = {
        FAST: functools.partial(linear_logprobs, entropy=True, memory="fast"),
        LEAN: functools.partial(linear_logprobs, entropy=True, memory="lean"),
        "unsloth_ext, fast, bf16 logits": functools.partial(
            linear_logprobs, entropy=True, memory="fast", logits_dtype=None
        ),
    }
    with contextlib.suppress(ImportError):
        import unsloth  # noqa: F401
        from unsloth_zoo.fused_losses.fused_linear import fused_linear_logprobs

        for name, differentiable in ((UNSLOTH, False), (f"{UNSLOTH}, differentiable entropy", True)):
            found[name] = functools.partial(
                fused_linear_logprobs, return_entropy=True, entropy_requires_grad=differentiable
            )
    with contextlib.suppress(ImportError):
        from trl.kernels import ChunkedLogProbFunction

        found[TRL] = lambda hidden, weight, labels: ChunkedLogProbFunction.apply(
            hidden, weight, None, labels, 1.0, TRL_COLUMNS, None, 1.0, ("entropy",)
        )[:2]
    with contextlib.suppress(ImportError):
        from liger_kernel.ops.fused_linear_scaled_cross_entropy import _FusedLinearPPOFallbackFunction

        def liger(hidden, weight, labels):
            nll, entropy = _FusedLinearPPOFallbackFunction.apply(hidden, weight, labels, 1.0, -100, True)
            return -nll, entropy

        found[f"{LIGER}, scaled cross entropy"] = liger
    return found


def inputs(rows, hidden_size, vocab_size, spread=1.3, seed=3407):
    generator = torch.Generator("cuda").manual_seed(seed)
    hidden = torch.randn(rows, hidden_size, device="cuda", generator=generator).bfloat16()
    weight = torch.empty(vocab_size, hidden_size, device="cuda", dtype=torch.bfloat16)
    for part in weight.split(16384):
        part.copy_(torch.randn(part.shape, device="cuda", generator=generator).mul_(spread / hidden_size**0.5))
    labels = torch.randint(0, vocab_size, (rows,), device="cuda", generator=generator)
    return hidden, weight, labels


def reference(hidden, weight, labels, trained, rows=512):
    """Mean loss, its gradient for hidden and, where trained, for weight, all in fp32."""
    grad_hidden = torch.empty(hidden.shape, device="cuda")
    grad_weight = torch.zeros(weight.shape, device="cuda") if trained else None
    wide, losses = weight.float(), []
    for x, y, out in zip(hidden.split(rows), labels.split(rows), grad_hidden.split(rows), strict=True):
        z = x.float() @ wide.t()
        lse = z.logsumexp(-1, keepdim=True)
        losses.append((lse - z.gather(1, y[:, None]))[:, 0])
        z.sub_(lse).exp_()
        z[torch.arange(len(y), device="cuda"), y] -= 1
        z.div_(len(labels))
        torch.mm(z, wide, out=out)
        if trained:
            grad_weight.addmm_(z.t(), x.float())
    return torch.cat(losses).mean(), grad_hidden, grad_weight


def error(found, true):
    return ((found.float() - true).norm() / true.norm()).item()


def release():
    gc.collect()
    torch.cuda.empty_cache()


def one_call(call, hidden, weight, labels):
    hidden.grad = weight.grad = None
    call(hidden, weight, labels).backward()


def measured(steps, rounds, calls=2, pauses=3):
    """name -> (sustained samples, samples after a pause) in ms; the contestants in turn."""
    sustained, rested = {name: [] for name in steps}, {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            step()
            step()
            marks = [torch.cuda.Event(enable_timing=True) for _ in range(calls + 1)]
            marks[0].record()
            for mark in marks[1:]:
                step()
                mark.record()
            marks[-1].synchronize()
            sustained[name] += [a.elapsed_time(b) for a, b in itertools.pairwise(marks)]
    for name, step in steps.items():
        for _ in range(pauses):
            torch.cuda.synchronize()
            time.sleep(0.25)
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            step()
            last.record()
            last.synchronize()
            rested[name].append(first.elapsed_time(last))
    return sustained, rested


def peak(step, leave):
    """MiB above what is allocated before, the results included; `leave` drops the results of an earlier call."""
    leave()
    torch.cuda.synchronize()
    base = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - base) / 2**20)


def cross_entropy_rows(calls, rows, hidden_size, vocab_size, trained, *, rounds, spread=1.3, errors=True, pauses=3):
    hidden, weight, labels = inputs(rows, hidden_size, vocab_size, spread)
    true = reference(hidden, weight, labels, trained) if errors else None
    hidden.requires_grad_()
    weight.requires_grad_(trained)

    def leave():
        hidden.grad = weight.grad = None

    found, steps = {}, {}
    for name, call in calls.items():
        step = functools.partial(one_call, call, hidden, weight, labels)
        try:
            step()
            step()
        except Exception as problem:  # a peer may not know this card or this shape: its row says so
            print(f"{name}: {type(problem).__name__}: {str(problem)[:150]}", flush=True)
            leave()
            release()
            continue
        found[name] = {}
        if errors:
            loss = call(hidden, weight, labels).detach().float()
            found[name]["loss_error"] = abs((loss - true[0]) / true[0]).item()
            found[name]["dx_error"] = round(error(hidden.grad, true[1]), 6)
            if trained:
                found[name]["dw_error"] = round(error(weight.grad, true[2]), 6)
        found[name]["mib"] = peak(step, leave)
        leave()
        release()
        steps[name] = step
    del true
    release()
    if rounds:
        sustained, rested = measured(steps, rounds, pauses=pauses)
        for name in steps:
            found[name] |= {"ms": record.percentiles(sustained[name], 2)}
            if pauses:
                found[name]["ms_after_a_pause"] = record.percentiles(rested[name], 2)
    head = "trained" if trained else "frozen"
    for name, row in found.items():
        text = ", ".join(f"{k} {v['p50'] if isinstance(v, dict) else v:.6g}" for k, v in row.items())
        print(f"{rows}x{hidden_size}x{vocab_size} {head} spread {spread}: {name}: {text}", flush=True)
    leave()
    release()
    parameters = {
        "case": f"cross entropy, {head} head",
        "shape": [rows, hidden_size, vocab_size],
        "spread": spread,
        "unit": "ms",
    }
    return [parameters | {"name": name} | row for name, row in found.items()]


def curve_rows(rows, hidden_size, vocab_size, *, rounds):
    """Ours over its workspace (frozen) or the rows of a chunk (trained): ms, MiB and the error of weight's gradient."""
    from unsloth_ext.loss import linear_softmax
    from unsloth_ext.loss.softmax import Options

    hidden, weight, labels = inputs(rows, hidden_size, vocab_size)
    one, options = torch.full((), 1 / rows, device="cuda"), Options()
    true = reference(hidden, weight, labels, True)
    steps, results, parameters = {}, {}, {}

    def frozen(mib):
        out = torch.empty_like(hidden)
        linear_softmax.token_losses(hidden, weight, None, labels, options, out=out, scale=one, sizes=(mib << 20, 26112))
        results["dx"], results["dw"] = out, None

    def trained(chunk):
        out, grad = torch.empty_like(hidden), torch.empty_like(weight)
        linear_softmax.chunked_gradients(
            hidden, weight, None, labels, options, out, grad, None, scales=(one, one), rows_per_chunk=chunk
        )
        results["dx"], results["dw"] = out, grad

    def lean(columns):
        out, grad = torch.empty_like(hidden), torch.empty_like(weight)
        values = linear_softmax.token_losses(hidden, weight, None, labels, options, out=out, scale=one, scratch=grad)
        linear_softmax.weight_gradient(
            hidden, weight, None, labels, values, None, None, options, grad, None, columns, scale=one
        )
        results["dx"], results["dw"] = out, grad

    for kind, function, sizes in (
        ("frozen head, workspace MiB", frozen, (6, 12, 24, 48, 72, 118, 200)),
        ("trained head, rows of a chunk", trained, (1024, 2048, 4096, 8192, rows)),
        ("trained head, lean, columns", lean, (512, 1024, 2048, 4096)),
    ):
        for size in sizes:
            steps[kind, size] = functools.partial(function, size)
    found = []
    for (kind, size), step in steps.items():
        step()
        parameters[kind, size] = {"mib": peak(step, results.clear), "dx_error": round(error(results["dx"], true[1]), 6)}
        if results["dw"] is not None:
            parameters[kind, size]["dw_error"] = round(error(results["dw"], true[2]), 6)
        results.clear()
        release()
    del true
    release()
    sustained, _ = measured(
        {key: lambda step=step: (results.clear(), step()) for key, step in steps.items()}, rounds, pauses=0
    )
    for (kind, size), row in parameters.items():
        row["ms"] = record.percentiles(sustained[kind, size], 2)
        print(
            f"curve, {kind} {size}: {row['ms']['p50']} ms, {row['mib']} MiB, dW error {row.get('dw_error')}", flush=True
        )
        found.append(
            {"case": f"curve, {kind}", "shape": [rows, hidden_size, vocab_size], "size": size, "unit": "ms"} | row
        )
    results.clear()
    release()
    return found


def grpo_rows(rows, hidden_size, vocab_size, *, rounds):
    """Log-probabilities with a gradient, entropies to look at; a clipped policy loss; forward and backward."""
    hidden, weight, labels = inputs(rows, hidden_size, vocab_size)
    hidden.requires_grad_()
    wide = weight.float()
    with torch.no_grad():
        true = []
        for x, y in zip(hidden[:4096].split(512), labels[:4096].split(512), strict=True):
            logp = (x.float() @ wide.t()).log_softmax(-1)
            true.append(torch.stack((logp.gather(1, y[:, None])[:, 0], -(logp.exp() * logp).sum(-1))))
        true = torch.cat(true, 1)
    del wide, logp
    advantages = torch.randn(rows, device="cuda")
    old = torch.full((rows,), -12.0, device="cuda")

    def one(call):
        hidden.grad = None
        logp, entropy = call(hidden, weight, labels)
        ratio = (logp - old).clamp(max=1).exp()
        loss = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean()
        loss.backward()
        return logp.detach(), entropy.detach()

    def leave():
        hidden.grad = None

    found, steps = {}, {}
    for name, call in grpo_contestants().items():
        step = functools.partial(one, call)
        try:
            logp, entropy = step()
        except Exception as problem:
            print(f"{name}: {type(problem).__name__}: {str(problem)[:150]}", flush=True)
            leave()
            release()
            continue
        found[name] = {
            "logp_rms_error": (logp[:4096].float() - true[0]).square().mean().sqrt().item(),
            "entropy_rms_error": (entropy[:4096].float() - true[1]).square().mean().sqrt().item(),
        }
        del logp, entropy
        found[name]["mib"] = peak(step, leave)
        leave()
        release()
        steps[name] = step
    sustained, rested = measured(steps, rounds)
    for name, row in found.items():
        row |= {"ms": record.percentiles(sustained[name], 2), "ms_after_a_pause": record.percentiles(rested[name], 2)}
        print(
            f"GRPO {rows}x{hidden_size}x{vocab_size}: {name}: {row['ms']['p50']} ms, after a pause {row['ms_after_a_pause']['p50']}, {row['mib']} MiB, log-probability off by {row['logp_rms_error']:.2e}",
            flush=True,
        )
    leave()
    release()
    parameters = {"case": "GRPO, log-probability and entropy", "shape": [rows, hidden_size, vocab_size], "unit": "ms"}
    return [parameters | {"name": name} | row for name, row in found.items()]


def claims(rows, versions):
    def pick(head, shape=MAIN, spread=1.3):
        return {
            r["name"]: r
            for r in rows
            if r["case"] == f"cross entropy, {head} head" and tuple(r["shape"]) == shape and r["spread"] == spread
        }

    made = []
    for head, limits in (("frozen", (49, 250, 58, 140)), ("trained", (78, 3277, 93, 1280))):
        found = pick(head)
        peers = {n: r for n, r in found.items() if n not in (*OURS, FULL, CHECKPOINT)}
        if not peers:
            continue
        best = min(peers, key=lambda n: peers[n]["ms"]["p50"])
        beside = f"{best}: {peers[best]['ms']['p50']} ms, {peers[best]['mib']} MiB ({versions})"
        for mode, ms, mib in (("fast", *limits[:2]), ("lean", *limits[2:])):
            ours = found[f"unsloth_ext, {mode}"]
            made.append((f"{head}_{mode}.ms", ours["ms"]["p50"], "ms", f"<= {ms}", beside))
            made.append((f"{head}_{mode}.mib", ours["mib"], "MiB", f"<= {mib}", beside))
        made.append(
            (
                f"{head}_fast.vs_best_peer",
                round(peers[best]["ms"]["p50"] / found[FAST]["ms"]["p50"], 3),
                "x",
                ">= 1.0",
                beside,
            )
        )
        if GENERIC in found and head == "frozen":
            slower = max(
                pick(h)[GENERIC]["ms"]["p50"] / pick(h)[FAST]["ms"]["p50"]
                for h in ("frozen", "trained")
                if GENERIC in pick(h)
            )
            made.append(("generic.vs_specialised", round(slower, 3), "x", "<= 1.25", "linear_cross_entropy, fast"))
    errors = [r["dw_error"] for r in rows if r["case"].startswith("curve") and "dw_error" in r]
    if errors:
        made.append(
            ("trained.dw_error_max", max(errors), "relative", "<= 0.0018", "fp32 logits and sums, over all chunk sizes")
        )
    challenge = pick("trained", CHALLENGE)
    if challenge:
        saving = 1 - max(challenge[n]["mib"] for n in (LEAN,) if n in challenge) / challenge[FULL]["mib"]
        made.append(
            (
                "challenge.vram_saving",
                round(saving, 4),
                "share",
                ">= 0.95",
                f"full logits, {challenge[FULL]['mib']} MiB; ours lean, weight's gradient included in both",
            )
        )
    grpo = {r["name"]: r for r in rows if r["case"].startswith("GRPO")}
    peers = {n: r for n, r in grpo.items() if not n.startswith("unsloth_ext")}
    if peers:
        best = min(peers, key=lambda n: peers[n]["ms"]["p50"])
        made.append(
            (
                "grpo.vs_best_peer",
                round(peers[best]["ms"]["p50"] / grpo[FAST]["ms"]["p50"], 3),
                "x",
                ">= 1.0",
                f"{best}: {peers[best]['ms']['p50']} ms, {peers[best]['mib']} MiB; ours {grpo[FAST]['mib']}",
            )
        )
    return [record.claim(f"loss.{name}", *rest) for name, *rest in made]


def draw(rows, folder):
    """Time against memory at the main shape: ours as curves, each peer a point."""

    def paint(*pair):
        for axes, head in zip(pair, ("frozen", "trained"), strict=True):
            for row in rows:
                if (
                    row["case"] == f"cross entropy, {head} head"
                    and tuple(row["shape"]) == MAIN
                    and row["spread"] == 1.3
                ):
                    ours, at = row["name"].startswith("unsloth_ext"), (row["mib"], row["ms"]["p50"])
                    axes.plot(*at, "o" if ours else "s", color="tab:red" if ours else "tab:blue")
                    text = row["name"].replace("unsloth_ext, ", "")
                    axes.annotate(text, at, fontsize=7, xytext=(4, 4), textcoords="offset points")
            for case in sorted({row["case"] for row in rows if row["case"].startswith(f"curve, {head}")}):
                points = sorted((r["mib"], r["ms"]["p50"]) for r in rows if r["case"] == case)
                axes.plot(*zip(*points, strict=True), "-", color="tab:red", alpha=0.6)
            title = f"{head} head, " + " x ".join(map(str, MAIN))
            axes.set(xscale="log", xlabel="peak MiB above the inputs", ylabel="ms", title=title, ylim=(0, None))

    plots.draw(folder, "loss", paint, columns=2, size=(11, 4.5))


def versions():
    from importlib.metadata import PackageNotFoundError, version

    found = []
    for package in ("unsloth_zoo", "liger_kernel", "cut_cross_entropy", "trl", "torch"):
        with contextlib.suppress(PackageNotFoundError):
            found.append(f"{package} {version(package)}")
    return ", ".join(found)


def main() -> int:
    if not torch.cuda.is_available():
        print("bench_loss: needs a CUDA card, left out")
        return 0
    quick = "--quick" in sys.argv
    os.environ["UNSLOTH_EXT_DISABLE"] = "loss"  # Unsloth and trl as they are, not led to ours
    torch.backends.cuda.matmul.allow_tf32 = False
    start, calls, rows = time.perf_counter(), contestants(), []
    rounds = 2 if quick else 5
    for trained in (False, True):
        rows += cross_entropy_rows(calls, *MAIN, trained, rounds=rounds)
    print(f"{time.perf_counter() - start:.0f} s", flush=True)
    rows += grpo_rows(*GRPO, rounds=2 if quick else 3)
    if not quick:
        rows += curve_rows(*MAIN, rounds=2)
        print(f"{time.perf_counter() - start:.0f} s", flush=True)
        few = {name: calls[name] for name in (FAST, LEAN, FULL) if name in calls}
        rows += cross_entropy_rows(few, *CHALLENGE, True, rounds=0, errors=False)
        wide = {name: calls[name] for name in (FAST, FAST32, LEAN, FULL, UNSLOTH, LIGER, CCE, TRL) if name in calls}
        for trained in (False, True):
            rows += cross_entropy_rows(wide, *MAIN, trained, rounds=0, spread=4.0)
        for *shape, trained, who in SHAPES:
            chosen = calls if who is None else {name: calls[name] for name in who if name in calls}
            rows += cross_entropy_rows(chosen, *shape, trained, rounds=2, errors=shape[0] <= 8192, pauses=0)
        print(f"{time.perf_counter() - start:.0f} s", flush=True)
    made = claims(rows, versions())
    file = record.write("loss", rows, made)
    draw(rows, file.parent)
    print(f"{time.perf_counter() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
