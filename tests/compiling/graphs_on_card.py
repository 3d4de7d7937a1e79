"""A small Llama trained on a card with and without CUDA graphs: `graphs_on_card.py KIND SCOPE`. The last line is JSON."""

import argparse
import json

import compile_on_card as card  # imports unsloth_ext and unsloth first
import torch

from unsloth_ext.compiling import compile_model, keep_dense_weights


def shapes(lengths):
    made = []
    for length in lengths:
        ids = torch.randint(4, 2048, (2, length)).cuda()
        made.append({"input_ids": ids, "labels": ids})
    return made


def trained(model, start, steps):
    """Losses and final weights of a run of optimizer steps, each a list of batches that are accumulated."""
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, value in start.items():
            parameters[name].copy_(value)
    optimizer, losses, gradients = torch.optim.SGD(parameters.values(), lr=0.05), [], []
    for number, step in enumerate(steps):
        optimizer.zero_grad(set_to_none=number % 3 != 2)
        for batch in step:
            loss = model(**batch).loss
            loss.backward()
            losses.append(loss.detach())  # read only at the end: later steps must not have changed it
        gradients.append(torch.cat([p.grad.flatten().double() for p in parameters.values()]))
        optimizer.step()
        if number % 5 == 4:  # in between, evaluation and generation
            model.eval()
            with torch.no_grad():
                model(**step[0])
            model.train()
    return torch.stack(losses).double(), gradients


def apart(found, wanted):
    worst = max(((a - b).norm() / b.norm()).item() for a, b in zip(found[1], wanted[1], strict=True))
    return {"loss": (found[0] - wanted[0]).abs().max().item(), "gradients": worst}


def dropout_differs(model, ids):
    """With dropout, two calls draw differently, recorded or not."""
    values = []
    for _ in range(3):
        model.zero_grad(set_to_none=True)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        values.append(loss.item())
    return len(set(values)) == 3


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=("unsloth", "plain"))
    parser.add_argument("scope", choices=("step", "block"))
    parser.add_argument("--dropout", action="store_true")
    parser.add_argument("--dense", action="store_true", help="with keep_dense_weights")
    options = parser.parse_args()
    card.checkpoint()
    model = card.load(options.kind, False)
    start = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    # Three lengths that repeat, alone and accumulated, and some that do not.
    same = [256, 384, 512]
    once = [int(n) for n in torch.randint(64, 700, (4,))]
    lengths = [[256]] * 6 + [[384, 384]] * 5 + [[256, 512, 384]] * 5 + [[n] for n in once] + [same[::-1]] * 4
    steps = [shapes(each) for each in lengths]
    found = {}
    plain = compile_model(model, options.scope)
    wanted = trained(model, start, steps)
    found["again"] = apart(trained(model, start, steps), wanted)  # the noise of atomics
    plain.restore()
    if options.dropout:
        for module in model.modules():
            if hasattr(module, "lora_dropout") and "default" in module.lora_dropout:
                module.lora_dropout["default"] = torch.nn.Dropout(0.2)
    if options.dense:
        keep_dense_weights(model)
    recorded = compile_model(model, options.scope, cuda_graphs=True)
    if options.dropout:
        ids = steps[0][0]["input_ids"]
        dropout_differs(model, ids)
        found["dropout_differs"] = dropout_differs(model, ids)
    else:
        found["recorded"] = apart(trained(model, start, steps), wanted)
    report = recorded.report()
    print(report)
    found |= {"forwards": report.recorded_forwards, "unrecorded": report.unrecorded, "breaks": report.breaks}
    found["skips"] = torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
    found["nodes"] = sum(len(roots) for roots in _tree().roots.values())
    print(json.dumps(found))


def _tree():
    from torch._inductor.cudagraph_trees import get_manager

    return get_manager(torch.cuda.current_device(), create_if_none_exists=False)


if __name__ == "__main__":
    main()
