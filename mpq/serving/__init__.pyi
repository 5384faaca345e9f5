from .engine_process import EngineDied as EngineDied
from .engine_process import EngineProcess as EngineProcess
from .environment import Environment as Environment
from .environment import find_environment as find_environment
