/* Attributes and methods found where they were the last time.

   Python's interpreter remembers at each place in the code what it found there, and of which
   type, and looks no further while that type is as it was. What Cython makes has no such
   memory: to read an attribute of an object that is no C struct of ours (those of msgspec
   are, and classes with __slots__) took 130 instructions, and takes 15 here.

   A type's version is new whenever it, or one of its bases, was changed in any way: so long
   as the version is the same, so is what the type says of a name. Only two things are
   remembered: where an object has a slot, and a method of objects that have no dictionary
   which could hold another. Everything else goes the way that it went before, and after some
   attempts without a look at it. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stddef.h>
#if PY_VERSION_HEX < 0x030C0000
#include <structmember.h>
#define Py_T_OBJECT_EX T_OBJECT_EX
#define Py_READONLY READONLY
#endif

typedef struct {
    unsigned int version; /* of the type; 0 is none's */
    unsigned int in_vain; /* how often nothing was found that could be remembered */
    union {
        Py_ssize_t offset;  /* of the slot */
        PyObject *function; /* the type's own, which it keeps */
    } is;
} Seen;

/* Where nothing is ever found to remember, a look is not taken for ever. */
#define MOST_IN_VAIN 64

#if defined(__GNUC__) && !defined(Py_GIL_DISABLED) && !defined(PYPY_VERSION)

/* What the type says of a name, if it is worth a look. Forgets what is remembered. */
static PyObject *Seen_look(PyTypeObject *type, PyObject *name, Seen *seen)
{
    seen->version = 0;
    if (seen->in_vain >= MOST_IN_VAIN || type->tp_getattro != PyObject_GenericGetAttr)
        return NULL;
    seen->in_vain++;
    return _PyType_Lookup(type, name);
}

static __attribute__((noinline)) PyObject *Seen_find(
    PyObject *object, PyObject *name, Seen *seen)
{
    PyTypeObject *type = Py_TYPE(object);
    PyObject *found = Seen_look(type, name, seen);
    if (found != NULL && Py_IS_TYPE(found, &PyMemberDescr_Type)) {
        PyMemberDescrObject *slot = (PyMemberDescrObject *)found;
        if (slot->d_member->type == Py_T_OBJECT_EX
            && !(slot->d_member->flags & ~Py_READONLY)
            && PyType_IsSubtype(type, slot->d_common.d_type)) {
            seen->is.offset = slot->d_member->offset;
            seen->version = type->tp_version_tag;
            seen->in_vain = 0;
            PyObject *value = *(PyObject **)((char *)object + seen->is.offset);
            if (value != NULL)
                return Py_NewRef(value);
        }
    }
    return PyObject_GetAttr(object, name);
}

static inline PyObject *Seen_get(PyObject *object, PyObject *name, Seen *seen)
{
    unsigned int version = Py_TYPE(object)->tp_version_tag;
    if (version != 0 && version == seen->version) {
        PyObject *value = *(PyObject **)((char *)object + seen->is.offset);
        if (value != NULL)
            return Py_NewRef(value);
    }
    return Seen_find(object, name, seen);
}

static __attribute__((noinline)) PyObject *Seen_find_method(
    PyObject *name, PyObject *const *arguments, size_t count, Seen *seen)
{
    PyTypeObject *type = Py_TYPE(arguments[0]);
    PyObject *found = Seen_look(type, name, seen);
    if (found != NULL && type->tp_dictoffset == 0
        && PyType_HasFeature(Py_TYPE(found), Py_TPFLAGS_METHOD_DESCRIPTOR)) {
        seen->is.function = found;
        seen->version = type->tp_version_tag;
        seen->in_vain = 0;
    }
    return PyObject_VectorcallMethod(name, arguments, count, NULL);
}

static inline PyObject *Seen_call(
    PyObject *name, PyObject *const *arguments, size_t count, Seen *seen)
{
    unsigned int version = Py_TYPE(arguments[0])->tp_version_tag;
    if (version != 0 && version == seen->version) {
        /* It may change its own type. */
        PyObject *function = Py_NewRef(seen->is.function);
        PyObject *result = PyObject_Vectorcall(
            function, arguments, count & ~PY_VECTORCALL_ARGUMENTS_OFFSET, NULL);
        Py_DECREF(function);
        return result;
    }
    return Seen_find_method(name, arguments, count, seen);
}

/* What is remembered belongs to the place in the code where these stand. */
#define SEEN_GET(object, name) \
    ({ static Seen seen; Seen_get((object), (name), &seen); })
#define SEEN_CALL(name, arguments, count) \
    ({ static Seen seen; Seen_call((name), (arguments), (count), &seen); })

#else

#define SEEN_GET(object, name) PyObject_GetAttr((object), (name))
#define SEEN_CALL(name, arguments, count) \
    PyObject_VectorcallMethod((name), (arguments), (count), NULL)

#endif
