"""`make claims`: every claim of benchmarks/data in one table. Exit code 1 if one does not hold."""

import sys

import record
from rich.console import Console
from rich.table import Table


def main() -> int:
    table = Table("claim", "value", "target", "holds", "against", "measured on", box=None, pad_edge=False)
    failed = 0
    for benchmark in record.load():
        facts = benchmark["environment"]
        place = f"{facts.get('card') or facts.get('cpu', '?')}, {facts['date'][:10]}"
        for claim in benchmark["claims"]:
            failed += not claim["holds"]
            verdict = "yes" if claim["holds"] else "[bold red]NO[/]"
            table.add_row(
                claim["id"], f"{claim['value']:g} {claim['unit']}", claim["target"], verdict, claim["baseline"], place
            )
    Console(width=None if sys.stdout.isatty() else 180).print(table)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
