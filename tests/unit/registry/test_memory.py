"""What is remembered of hosts, by several threads and several processes."""

from __future__ import annotations

import threading

from serpentine.registry.memory import DEAD_FOR, HostMemory


def test_shared_by_a_folder(tmp_path):
    now = 1000.0
    one, two = (HostMemory(tmp_path, clock=lambda: now) for _ in range(2))
    one.close("h:1", 30)
    assert two.closed_for("h:1") == 30
    two.note_dead("h:1", "it fell over")
    assert one.is_dead("h:1")
    # The one did not undo the other.
    assert one.closed_for("h:1") == 30
    now += DEAD_FOR
    assert not one.is_dead("h:1")
    assert one.closed_for("h:1") == 0


def test_a_look_does_not_undo_what_is_being_written(tmp_path, monkeypatch):
    memory = HostMemory(tmp_path)
    write = memory._write

    def meanwhile(host: str) -> None:
        """Another process writes, and another thread looks."""
        monkeypatch.setattr(memory, "_write", write)
        HostMemory(tmp_path).note_dead(host, "why")
        looks = threading.Thread(target=memory.closed_for, args=(host,))
        looks.start()
        looks.join(0.2)
        write(host)

    monkeypatch.setattr(memory, "_write", meanwhile)
    memory.close("h", 30)
    assert memory.closed_for("h") > 0
    assert HostMemory(tmp_path).closed_for("h") > 0
