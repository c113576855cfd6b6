from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class V1(_message.Message):
    __slots__ = ("memory_oom_control",)
    class MemoryOomControl(_message.Message):
        __slots__ = ("oom_kill",)
        OOM_KILL_FIELD_NUMBER: _ClassVar[int]
        oom_kill: int
        def __init__(self, oom_kill: _Optional[int] = ...) -> None: ...
    MEMORY_OOM_CONTROL_FIELD_NUMBER: _ClassVar[int]
    memory_oom_control: V1.MemoryOomControl
    def __init__(self, memory_oom_control: _Optional[_Union[V1.MemoryOomControl, _Mapping]] = ...) -> None: ...

class V2(_message.Message):
    __slots__ = ("memory_events",)
    class MemoryEvents(_message.Message):
        __slots__ = ("oom_kill",)
        OOM_KILL_FIELD_NUMBER: _ClassVar[int]
        oom_kill: int
        def __init__(self, oom_kill: _Optional[int] = ...) -> None: ...
    MEMORY_EVENTS_FIELD_NUMBER: _ClassVar[int]
    memory_events: V2.MemoryEvents
    def __init__(self, memory_events: _Optional[_Union[V2.MemoryEvents, _Mapping]] = ...) -> None: ...
