"""Every vLLM process imports the plugin, so it must cost nothing; and its schedulers are what vLLM asks for."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from batchllm_kernels.vllm_plugin import ATTENTION_VARIABLE, scheduler_path


def test_importing_the_plugin_loads_the_standard_library_only() -> None:
    code = (
        "import sys; before = set(sys.modules); import batchllm_kernels.vllm_plugin; "
        "print(*sorted({name.partition('.')[0] for name in set(sys.modules) - before}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) - set(sys.stdlib_module_names) == {"batchllm_kernels"}


@pytest.mark.parametrize(("asynchronous", "base"), [(False, Scheduler), (True, AsyncScheduler)])
def test_the_scheduler_of_each_kind_resolves_to_a_subclass_of_vllms(asynchronous: bool, base: type) -> None:
    found = resolve_obj_by_qualname(scheduler_path(async_scheduling=asynchronous))
    assert issubclass(found, base)
    assert issubclass(found, AsyncScheduler) == asynchronous


def registered_backend(environment: dict[str, str]) -> str:
    """What vLLM takes for `CUSTOM` in a fresh process that has loaded its plugins, twice; empty: nothing."""
    code = (
        "from vllm.plugins import load_plugins_by_group, load_general_plugins\n"
        "load_general_plugins()\n"
        "for plugin in load_plugins_by_group('vllm.general_plugins').values(): plugin()\n"
        "from vllm.v1.attention.backends.registry import AttentionBackendEnum as Backends\n"
        "try: print('FOUND', Backends.CUSTOM.get_path())\n"
        "except ValueError: print('FOUND')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ | environment
    )
    return done.stdout.partition("FOUND")[2].strip()


def test_the_plugin_of_our_metadata_registers_attention_only_where_the_environment_asks_for_it() -> None:
    assert not registered_backend({})
    found = registered_backend({ATTENTION_VARIABLE: "FLASH_ATTN"})
    assert found == "batchllm_kernels.vllm_plugin.shared_flash_attn.SharedBackend"
