"""SkyRL's server for backend.kind = "tinker", without uv: in an environment of its own, as it wants another transformers.

    python -m venv skyrl && skyrl/bin/pip install skyrl==0.3.0 torch 'tinker<0.25' 'fastapi[standard]' sqlmodel \\
        'sqlalchemy[asyncio]' aiosqlite 'jax<1.0,>=0.8' 'flax>=0.12.2' 'optax>=0.2.5'
    skyrl/bin/python skyrl_server.py --base-model MODEL --port 8000 --backend-config '{"max_lora_adapters": 9}'

Options are those of `python -m skyrl.tinker.api`, which starts its engine by `uv run` and needs Python 3.12. On a machine
without a GPU set JAX_PLATFORMS=cpu.
"""

import argparse
import runpy
import sys
import typing

import typing_extensions

typing.TypedDict = typing_extensions.TypedDict  # pydantic asks for this one before Python 3.12

if __name__ == "__main__":
    if sys.argv[1:2] == ["engine"]:
        del sys.argv[1]
        runpy.run_module("skyrl.tinker.engine", run_name="__main__")
        sys.exit()
    import uvicorn
    from skyrl.tinker import api
    from skyrl.tinker.config import EngineConfig, add_model, config_to_argv

    parser = argparse.ArgumentParser()
    add_model(parser, EngineConfig)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    given = vars(parser.parse_args())
    host, port = given.pop("host"), given.pop("port")
    api._build_uv_run_cmd_engine = lambda _, config: [sys.executable, __file__, "engine", *config_to_argv(config)]
    api.app.state.engine_config = EngineConfig.model_validate(given)
    uvicorn.run(api.app, host=host, port=port)
