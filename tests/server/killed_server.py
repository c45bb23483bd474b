"""A server over the stub, to be killed: killed_server.py DATA PORT_FILE."""

import sys
from pathlib import Path

import uvicorn

from mezzotint.server import Settings, create_app
from mezzotint.server.app import _listen
from mezzotint.server.service import Service
from stub_server import StubModels

data, port_file = Path(sys.argv[1]), Path(sys.argv[2])
settings = Settings(data=data, port=0)
app = create_app(settings, Service(settings, StubModels(settings, delay=0.002)))
listener = _listen(settings)
port_file.write_text(str(listener.getsockname()[1]))
uvicorn.Server(uvicorn.Config(app, log_config=None)).run(sockets=[listener])
