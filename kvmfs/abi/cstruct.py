# SPDX-License-Identifier: GPL-2.0-or-later
"""C structs as annotated classes.

ctypes wants a list of (name, type) pairs, a type checker wants annotations. Here the annotations are the
only list: `layout` turns them into `_fields_`, so that a struct reads like its C declaration and its fields
are typed.

    @layout
    class KvmXcr(Structure):
        xcr: U32
        reserved: U32
        value: U64

A field whose annotation is a Structure or Union is embedded; an array is written
`Annotated[Array[c_uint8], c_uint8 * 16]`. A trailing flexible array is not a field: sizeof() is the header,
as in C. Pointers of the client are U64: they are addresses in another process, never to be followed here.
"""

from ctypes import LittleEndianStructure as Structure
from ctypes import Union, c_int8, c_int16, c_int32, c_int64, c_uint8, c_uint16, c_uint32, c_uint64
from inspect import get_annotations
from typing import Annotated, Any, TypeVar, get_args

__all__ = ["S8", "S16", "S32", "S64", "U8", "U16", "U32", "U64", "Structure", "Union", "layout", "offset_of"]

U8 = Annotated[int, c_uint8]
U16 = Annotated[int, c_uint16]
U32 = Annotated[int, c_uint32]
U64 = Annotated[int, c_uint64]
S8 = Annotated[int, c_int8]
S16 = Annotated[int, c_int16]
S32 = Annotated[int, c_int32]
S64 = Annotated[int, c_int64]

_Aggregate = TypeVar("_Aggregate", bound=Structure | Union)


def layout(cls: type[_Aggregate]) -> type[_Aggregate]:
    """Lay out `cls` as its annotations say, in their order, with C's alignment."""
    # After the class statement and not in __init_subclass__: ctypes attaches its own record to the class
    # only when the statement has ended.
    cls._fields_ = [
        (name, get_args(hint)[1] if get_args(hint) else hint) for name, hint in get_annotations(cls).items()
    ]
    return cls


def offset_of(cls: type[Structure | Union], path: str) -> int:
    """Byte offset of a field; `path` may go into embedded structs ("s.regs.sregs").

    Raises AttributeError when there is no such field.
    """
    offset = 0
    aggregate: Any = cls
    for name in path.split("."):
        offset += getattr(aggregate, name).offset
        aggregate = dict(aggregate._fields_).get(name)
    return offset
