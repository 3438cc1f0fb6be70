"""Describes the machine in the result file, and prints the table at the end."""

from __future__ import annotations

import pytest
import speed_table

from pymerge.speed import machine

ROWS = pytest.StashKey[list]()


def pytest_addoption(parser) -> None:
    parser.addoption(
        "--naive-seconds", type=float, default=4.0, help="time to spend on the baseline per case; it runs once at least (default: 4)"
    )


def pytest_configure(config) -> None:
    config.stash[ROWS] = []


@pytest.fixture
def measured_rows(request) -> list[dict]:
    return request.config.stash[ROWS]


def pytest_benchmark_update_machine_info(config, machine_info) -> None:
    machine_info.clear()  # the plugin's own has the host's name
    machine_info.update(machine.describe())


def pytest_terminal_summary(terminalreporter, config) -> None:
    if rows := config.stash[ROWS]:
        terminalreporter.ensure_newline()
        speed_table.print_rows(rows, machine.describe())
