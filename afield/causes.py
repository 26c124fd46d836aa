"""Exceptions of the user's code: the one place that touches them, and how they travel.

Theory of operation. A class of the user's may have properties that raise or never return, `__getattr__`, `__getattribute__`,
`__setattr__`, `__eq__`, `__class__` or a metaclass of its own. So what every exception has is read and written here by
`BaseException`'s own descriptors, which run no code of the user's, and types are compared by `type(error)`. What remains are
the text and the pickle, which are the user's code by nature: they are asked for under a guard that nothing leaves.

An exception travels inside a `TaskError` as a pickle of its own (`carried`), which was made and rebuilt on trial where the
exception was raised: as it says it is pickled, or else in parts, put together again without its constructor; of a group each
member so. Where it arrives it may still not be rebuilt, mostly since its class cannot be imported there; then `open_cause`
returns None, and the `TaskError` stands without it. Whoever has to pass an error on and must not run code of the user's, since
it holds a lock, reads it with `load_unopened`.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterator
from types import BuiltinFunctionType, MemberDescriptorType
from typing import Any

_EXCEPTION = vars(BaseException)
_TYPE = vars(type)
_NOTES = "__notes__"
#: What every exception has; a class of the user's may have put something else in its place.
INNATE = (
    "__cause__",
    "__context__",
    "__suppress_context__",
    "__traceback__",
    "__dict__",
    "args",
    "add_note",
    "with_traceback",
)
#: Text that a module or a class gives as its name is looked at up to this length.
_MAX_NAME = 1000

#: So much of an error's text is shown, in characters: all of it is in its `args`.
MAX_TEXT = 65_536
_TEXTS = (str, bytes, bytearray)
_CONTAINERS: dict[type, tuple[str, str]] = {
    list: ("[", "]"),
    tuple: ("(", ")"),
    dict: ("{", "}"),
    set: ("{", "}"),
    frozenset: ("frozenset({", "})"),
}
#: Containers within containers are looked into so far.
_DEEPEST = 8
#: These make an error's text of its `args`.
_TEXT_OF_ARGS = (_EXCEPTION["__str__"], vars(KeyError)["__str__"])

Dumps = Callable[[Any], bytes]


# -- looking at them --------------------------------------------------------------------------------------------------


def is_a(error: BaseException, kinds: type | tuple[type, ...]) -> bool:
    """Tell whether an error is of a type; `isinstance` would also ask its `__class__`."""
    return issubclass(type(error), kinds)


def innate(error: BaseException, name: str) -> Any:
    """Return what every exception has under this name."""
    return _EXCEPTION[name].__get__(error)


def put_innate(error: BaseException, name: str, value: Any) -> None:
    """Set what every exception has under this name."""
    _EXCEPTION[name].__set__(error, value)


def state_of(error: BaseException) -> dict[str, Any]:
    """Return the attributes of an error, to be read or written."""
    state: dict[str, Any] = _EXCEPTION["__dict__"].__get__(error)
    return state


def members_of(error: BaseException) -> tuple[BaseException, ...]:
    """Return the errors in a group; of any other error none."""
    if not is_a(error, BaseExceptionGroup):
        return ()
    members: tuple[BaseException, ...] = vars(BaseExceptionGroup)["exceptions"].__get__(error)
    return members


def group_of(error: BaseException) -> tuple[Any, ...]:
    """Return what a group is made of, its text and the errors in it; of any other error nothing."""
    members = members_of(error)
    return (vars(BaseExceptionGroup)["message"].__get__(error), members) if members else ()


def notes_of(error: BaseException) -> list[str]:
    """Return the notes of an error."""
    notes = state_of(error).get(_NOTES)
    return [text_of(note) for note in notes] if type(notes) is list or type(notes) is tuple else []


def add_note(error: BaseException, text: str) -> None:
    """Add a note to an error."""
    state = state_of(error)
    notes = state.get(_NOTES)
    state[_NOTES] = [*notes, text] if type(notes) is list else [text]


def text_of(error: object) -> str:
    """Return the text of an error or of a note, whatever its `__str__` does; of a long one the first MAX_TEXT characters."""
    try:
        if _is_large(error):
            return _text_of_large(error)
        return _cut(str.__str__(str(error))[:])
    except BaseException:
        return "(its text cannot be shown)"


def _cut(text: str) -> str:
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]}... ({len(text)} characters in all)"


def _is_large(error: object) -> bool:
    """Tell whether the text of an error is the `repr` of many bytes: to make that takes longer than to send them."""
    kind = type(error)
    if not issubclass(kind, BaseException) or class_attribute(kind, "__str__") not in _TEXT_OF_ARGS:
        return False
    return _left_of(MAX_TEXT, innate(error, "args"), 0) < 0  # type: ignore[arg-type]


def _left_of(room: int, value: Any, depth: int) -> int:
    """Return what is left of so many characters after the `repr` of a value, roughly; below 0 if it is longer."""
    kind = type(value)
    if kind in _TEXTS:
        return room - len(value)
    if kind not in _CONTAINERS or depth == _DEEPEST:
        return room - 1
    room -= 2
    for item in value:
        if room < 0:
            break
        room = _left_of(room - 2, item, depth + 1)
        if kind is dict:
            room = _left_of(room, value[item], depth + 1)
    return room


def _text_of_large(error: Any) -> str:
    args = innate(error, "args")
    if len(args) != 1:
        return _shortened(args, MAX_TEXT, 0)
    if type(args[0]) is str and class_attribute(type(error), "__str__") is _EXCEPTION["__str__"]:
        return _cut(args[0])
    return _shortened(args[0], MAX_TEXT, 0)


def _shortened(value: Any, room: int, depth: int) -> str:
    """Return the `repr` of a value, or the beginning of it with a word about the rest."""
    kind = type(value)
    if kind in _TEXTS:
        return repr(value) if len(value) <= room else f"{repr(value[:room])[:room]}... ({len(value)} in all)"
    if kind not in _CONTAINERS or not value:
        return repr(value)
    if depth == _DEEPEST:
        return "..."
    shown: list[str] = []
    for item in value:
        if room < 0:
            shown.append(f"... ({len(value)} in all)")
            break
        text = _shortened(item, room, depth + 1)
        if kind is dict:
            text += f": {_shortened(value[item], max(0, room - len(text)), depth + 1)}"
        room -= len(text) + 2
        shown.append(text)
    begin, end = _CONTAINERS[kind]
    return begin + ", ".join(shown) + ("," if kind is tuple and len(value) == 1 else "") + end


def name_of(kind: type) -> tuple[str, str]:
    """Return the module and the qualified name of a class, whatever its metaclass says."""
    try:
        module = _TYPE["__module__"].__get__(kind)
    except AttributeError:  # its namespace has none
        module = ""
    name = _TYPE["__qualname__"].__get__(kind)
    return module[:_MAX_NAME] if type(module) is str else "", name[:_MAX_NAME]


def class_attribute(kind: type, name: str, default: Any = None) -> Any:
    """Return what a class or one of its bases has under this name, as it is."""
    for each in _TYPE["__mro__"].__get__(kind):
        attributes = _TYPE["__dict__"].__get__(each)
        if name in attributes:
            return attributes[name]
    return default


# -- making them ------------------------------------------------------------------------------------------------------


def new(kind: type[Any], args: tuple[Any, ...] = ()) -> Any:
    """Make an instance of an exception class, without running its `__new__` and `__init__`."""
    each: Any = kind
    while True:  # along the bases that decide about the memory of an instance, of which the last is `BaseException`
        maker = _TYPE["__dict__"].__get__(each).get("__new__")
        if type(maker) is BuiltinFunctionType:
            return maker(kind, *args) if issubclass(kind, BaseExceptionGroup) else maker(kind)
        each = _TYPE["__base__"].__get__(each)


def slots_of(kind: type) -> Iterator[tuple[str, Any]]:
    """Yield the attributes that instances keep outside of their `__dict__`: those of `__slots__`, and `errno` and the like."""
    for each in _TYPE["__mro__"].__get__(kind):
        for name, member in _TYPE["__dict__"].__get__(each).items():
            if type(member) is MemberDescriptorType and name not in INNATE:
                yield name, member


def copy_slots(source: BaseException, target: BaseException) -> None:
    """Give an error the attributes of another that are kept outside of its `__dict__`."""
    for _, member in slots_of(type(source)):
        try:
            member.__set__(target, member.__get__(source))
        except (AttributeError, TypeError):
            continue  # it has no value, or may not be written


class _Parts:
    """Carries an exception that pickle cannot rebuild, mostly because its constructor takes something else than `args`.

    Attributes that cannot be pickled stay behind; an argument that cannot is its text, so that the error's is the same.
    """

    def __init__(self, error: BaseException, dumps: Dumps) -> None:
        state = {name: value for name, value in state_of(error).items() if _survives(value, dumps)}
        slots = {}
        for name, member in slots_of(type(error)):
            try:
                value = member.__get__(error)
            except AttributeError:
                continue
            if value is not None and _survives(value, dumps):
                slots[name] = value
        args = tuple(each if _survives(each, dumps) else _in_words(each) for each in innate(error, "args"))
        self._parts = type(error), args, state, slots

    def __reduce__(self) -> tuple[Any, ...]:
        return _from_parts, self._parts


def _in_words(value: object) -> str:
    try:
        return _cut(_shortened(value, MAX_TEXT, 0))
    except BaseException:  # code of the user's has run
        return f"({name_of(type(value))[1]}, which cannot be shown)"


class _Members:
    """Carries a group of exceptions of which one cannot be pickled, or rebuilt, as it is: each of them by itself.

    One that cannot travel at all is an `Exception` with its name and its text where the group arrives.
    """

    def __init__(self, error: BaseException, dumps: Dumps) -> None:
        text, members = group_of(error)
        carried_members = [(Cause(member), f"{name_of(type(member))[1]}: {text_of(member)}") for member in members]
        state = {name: value for name, value in state_of(error).items() if _survives(value, dumps)}
        self._parts = type(error), text, carried_members, state

    def __reduce__(self) -> tuple[Any, ...]:
        return _from_members, self._parts


def _from_members(
    kind: type, text: str, members: list[tuple[BaseException | None, str]], state: dict[str, Any]
) -> BaseException:
    opened = [Exception(f"{said} (it could not be pickled)") if member is None else member for member, said in members]
    error: BaseException = new(kind, (text, opened))
    state_of(error).update(state)
    return error


def _from_parts(kind: type, args: tuple[Any, ...], state: dict[str, Any], slots: dict[str, Any]) -> BaseException:
    error: BaseException = new(kind, args)
    put_innate(error, "args", args)
    state_of(error).update(state)
    for name, member in slots_of(kind):
        if name in slots:
            try:
                member.__set__(error, slots[name])
            except (AttributeError, TypeError):
                continue  # it may not be written
    return error


# -- on their way -----------------------------------------------------------------------------------------------------


class Cause:
    """Stands for an exception in what is pickled; `runtime.process.serialization` has pickle do it with its own pickler."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __reduce__(self) -> tuple[Any, ...]:
        return carried(self.error, _dumps)


class Unopened:
    """The pickle of an exception that was not rebuilt here, and is passed on as it is."""

    def __init__(self, data: bytes = b"") -> None:
        self.data = data

    def __reduce__(self) -> tuple[Any, ...]:
        return open_cause, (self.data,)


def _dumps(value: Any) -> bytes:
    """Classes of `__main__` travel by value, which plain pickle cannot do."""
    import cloudpickle

    data: bytes = cloudpickle.dumps(value, 5)
    return data


def carried(error: BaseException, dumps: Dumps) -> tuple[Any, ...]:
    """Return what pickle is to make of an exception: what opens its pickle, or nothing where it has none."""
    parts = _Members if is_a(error, BaseExceptionGroup) else _Parts
    shapes: list[Callable[[], Any]] = [lambda: error, lambda: parts(error, dumps)]
    if _loses_slots(type(error)):
        shapes.reverse()
    for shape in shapes:
        try:
            data = dumps(shape())
            if is_a(pickle.loads(data), BaseException):
                return open_cause, (data,)
        except BaseException:
            continue  # also what would end the program, which is the user's as well
    return NOTHING_CARRIED


def _loses_slots(kind: type) -> bool:
    """Tell whether pickle leaves attributes behind: those in `__slots__`, of which exceptions as such know nothing."""
    for each in _TYPE["__mro__"].__get__(kind):
        attributes = _TYPE["__dict__"].__get__(each)
        if "__reduce__" in attributes or "__reduce_ex__" in attributes:
            return False
        if "__slots__" in attributes and any(type(member) is MemberDescriptorType for member in attributes.values()):
            return True
    return False


def _survives(value: object, dumps: Dumps) -> bool:
    try:
        pickle.loads(dumps(value))
    except BaseException:
        return False
    return True


def open_cause(data: bytes) -> Any:
    """Rebuild an exception; None where that is not possible. Its name is in pickles."""
    if not data:
        return None
    try:
        error = pickle.loads(data)
    except KeyboardInterrupt:
        raise  # on trial it did not raise that, so this one is for us
    except BaseException:
        return None
    return error if is_a(error, BaseException) else None


#: What becomes of an exception that cannot travel.
NOTHING_CARRIED: tuple[Any, ...] = (open_cause, (b"",))


class _Unopening(pickle.Unpickler):
    """Leaves the causes as they are."""

    def find_class(self, module: str, name: str) -> Any:
        """Put what keeps a cause in the place of what opens it."""
        if module == __name__ and name == "open_cause":
            return Unopened
        return super().find_class(module, name)


def load_unopened(data: bytes | memoryview, buffers: Any = ()) -> Any:
    """Unpickle an error without the exception of the user's inside it, which is passed on as it is."""
    return _Unopening(io.BytesIO(data), buffers=buffers).load()
