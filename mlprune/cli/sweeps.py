"""The commands `sweep` and `status`: run a sweep, here or on a cluster, and observe it."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from mlprune.cli.command import Values, command, corpus_option, spec_of
from mlprune.errors import SpecError

if TYPE_CHECKING:
    from mlprune.remote.job_package import JobPackage


@command
@click.argument("spec", required=False)
@click.option("--dry-run", is_flag=True, help="Print the plan; run nothing.")
@click.option("--cluster", metavar="FILE", help="Run on the cluster that `ray up FILE` started.")
@click.option("--attach", is_flag=True, help="Watch the cluster's running sweep again, or else its last one.")
@corpus_option
def sweep(
    spec: str | None,
    dry_run: bool,
    cluster: str | None,
    attach: bool,
    corpus: str | None,
    assignments: tuple[str, ...],
) -> Values:
    """Run a sweep of pruning variants.

    SPEC is a YAML file, or the name of a sweep that comes with mlprune (default: quickstart). An interrupted
    sweep resumes where it stopped: run the same command again.
    """
    if cluster is not None:
        from mlprune.remote.ssh import check_cluster_file

        check_cluster_file(cluster)
    if attach:
        if cluster is None or spec or dry_run or corpus or assignments:
            raise SpecError(
                "--attach", "given", "use it with --cluster FILE, and with no option other than --json"
            )
        return _watch(cluster, None)
    spec = spec or "quickstart"
    checked = spec_of(spec, assignments, {"calibration.corpus": corpus})
    if cluster is not None:
        from mlprune.remote.job_package import package_job
        from mlprune.spec.loading import to_assignments

        options = [*to_assignments({"calibration.corpus": corpus}), *assignments]
        return _watch(cluster, package_job(spec, checked, options, dry_run))
    from mlprune.report import sweep as report
    from mlprune.report.live import live_view
    from mlprune.report.page import description
    from mlprune.sweep.plan import plan_sweep
    from mlprune.sweep.sweep import run_sweep

    if dry_run:
        plan = plan_sweep(checked)
        report.show_plan(plan)
        return report.plan_values(plan)
    with live_view() as show:
        outcome = run_sweep(checked, show, description)
    report.show_outcome(outcome)
    return report.outcome_values(outcome)


def _watch(file: str, package: JobPackage | None) -> Values:
    """Submit a sweep to the cluster (None: find the one there), watch it, and return its result."""
    from mlprune.remote import jobs as remote

    context = click.get_current_context()
    cluster = context.with_resource(remote.connect(file))
    code, values = cluster.watch(cluster.latest() if package is None else cluster.start(package))
    if code != remote.INTERRUPTED:
        context.call_on_close(cluster.keep_tunnel_open)  # after the result has been written
    if values is None:
        sys.exit(code)
    return values


@command
@click.option(
    "--cluster", metavar="FILE", help="Show the sweeps on the head of the cluster that `ray up FILE` started."
)
def status(cluster: str | None, assignments: tuple[str, ...]) -> Values:
    """Show the sweeps that run on this machine.

    For each sweep: active trials, shards and remaining time.
    """
    if assignments:
        raise SpecError("--set", repr(assignments[0]), "status reads no spec; leave it out")
    if cluster is not None:
        from mlprune.remote import jobs as remote

        values: Values = remote.cluster_status(cluster)
        return values
    from mlprune.report import live as report
    from mlprune.sweep.status import running_sweeps

    sweeps = running_sweeps()
    report.show_running(sweeps)
    return report.running_values(sweeps)
