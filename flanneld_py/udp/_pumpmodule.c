/* The pump as a Python type. The only file that knows Python; of its API only what every version from 3.11 on has. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "pump.h"

typedef struct {
    PyObject_HEAD
    struct pump *pump;
    struct offloads offloads;
} Pump;

static PyObject *pump_type_new(PyTypeObject *type, PyObject *arguments, PyObject *keywords)
{
    static char *names[] = {"tun", "udp", "tso", "uso", "udp_segment", "udp_gro", NULL};
    int tun, udp, tso = 1, uso = 1, udp_segment = 1, udp_gro = 1;
    if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "ii|pppp", names, &tun, &udp, &tso, &uso, &udp_segment,
                                     &udp_gro))
        return NULL;
    struct offloads offloads = {.tso = tso, .uso = uso, .udp_segment = udp_segment, .udp_gro = udp_gro};
    const char *what = "";
    struct pump *pump = pump_new(tun, udp, &offloads, &what);
    if (pump == NULL)
        return PyErr_SetFromErrnoWithFilename(PyExc_OSError, what);
    allocfunc allocate = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    Pump *self = (Pump *)allocate(type, 0);
    if (self == NULL)
        return NULL;
    self->pump = pump; /* never freed: its threads run as long as the process */
    self->offloads = offloads;
    return (PyObject *)self;
}

static void pump_type_dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(self);
    Py_DECREF(type);
}

static PyObject *pump_type_set_table(PyObject *self, PyObject *argument)
{
    char *bytes;
    Py_ssize_t length;
    if (PyBytes_AsStringAndSize(argument, &bytes, &length) != 0)
        return NULL;
    const char *wrong;
    Py_BEGIN_ALLOW_THREADS
    wrong = pump_set_table(((Pump *)self)->pump, (const uint8_t *)bytes, (size_t)length);
    Py_END_ALLOW_THREADS
    if (wrong != NULL) {
        PyErr_SetString(PyExc_ValueError, wrong);
        return NULL;
    }
    Py_RETURN_NONE;
}

static PyObject *pump_type_counters(PyObject *self, PyObject *none)
{
    (void)none;
    uint64_t counters[COUNTERS];
    pump_counters(((Pump *)self)->pump, counters);
    PyObject *result = PyTuple_New(COUNTERS);
    for (Py_ssize_t i = 0; result != NULL && i < COUNTERS; i++) {
        PyObject *value = PyLong_FromUnsignedLongLong(counters[i]);
        if (value == NULL || PyTuple_SetItem(result, i, value) != 0)
            Py_CLEAR(result);
    }
    return result;
}

static PyObject *pump_type_wait(PyObject *self, PyObject *argument)
{
    long fd = PyLong_AsLong(argument);
    if (fd == -1 && PyErr_Occurred() != NULL)
        return NULL;
    const char *failure;
    Py_BEGIN_ALLOW_THREADS
    failure = pump_wait(((Pump *)self)->pump, (int)fd);
    Py_END_ALLOW_THREADS
    if (failure == NULL)
        Py_RETURN_NONE;
    return PyUnicode_FromString(failure);
}

static PyObject *pump_type_park(PyObject *self, PyObject *none)
{
    (void)none;
    Py_BEGIN_ALLOW_THREADS
    pump_park(((Pump *)self)->pump);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyObject *pump_type_offloads(PyObject *self, void *none)
{
    (void)none;
    const struct offloads *offloads = &((Pump *)self)->offloads;
    const char *const names[] = {offloads->tso ? "tso" : NULL, offloads->uso ? "uso" : NULL,
                                 offloads->udp_segment ? "udp_segment" : NULL, offloads->udp_gro ? "udp_gro" : NULL};
    PyObject *list = PyList_New(0);
    for (size_t i = 0; list != NULL && i < sizeof names / sizeof *names; i++) {
        if (names[i] == NULL)
            continue;
        PyObject *name = PyUnicode_FromString(names[i]);
        if (name == NULL || PyList_Append(list, name) != 0)
            Py_CLEAR(list);
        Py_XDECREF(name);
    }
    if (list == NULL)
        return NULL;
    PyObject *result = PyList_AsTuple(list);
    Py_DECREF(list);
    return result;
}

static PyMethodDef methods[] = {
    {"set_table", pump_type_set_table, METH_O, NULL}, {"counters", pump_type_counters, METH_NOARGS, NULL},
    {"wait", pump_type_wait, METH_O, NULL},           {"park", pump_type_park, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef properties[] = {{"offloads", pump_type_offloads, NULL, NULL, NULL}, {NULL, NULL, NULL, NULL, NULL}};

static PyType_Slot slots[] = {
    {Py_tp_new, pump_type_new}, {Py_tp_dealloc, pump_type_dealloc}, {Py_tp_methods, methods},
    {Py_tp_getset, properties}, {0, NULL},
};

static PyType_Spec type_spec = {
    .name = "flanneld_py.udp._pump.Pump", .basicsize = sizeof(Pump), .flags = Py_TPFLAGS_DEFAULT, .slots = slots};

static int add_names(PyObject *module, const char *attribute, Py_ssize_t number, void (*name_of)(unsigned, char *))
{
    PyObject *names = PyTuple_New(number);
    for (Py_ssize_t i = 0; names != NULL && i < number; i++) {
        char name[64];
        name_of((unsigned)i, name);
        PyObject *text = PyUnicode_FromString(name);
        if (text == NULL || PyTuple_SetItem(names, i, text) != 0)
            Py_CLEAR(names);
    }
    int failed = names == NULL ? -1 : PyModule_AddObjectRef(module, attribute, names);
    Py_XDECREF(names);
    return failed;
}

static void drop_name(unsigned reason, char *name)
{
    PyOS_snprintf(name, 64, "%s", drop_names[reason]);
}

static int fill_module(PyObject *module)
{
    PyObject *type = PyType_FromSpec(&type_spec);
    int failed = type == NULL ? -1 : PyModule_AddObjectRef(module, "Pump", type);
    Py_XDECREF(type);
    if (failed != 0 || add_names(module, "DROP_REASONS", DROPS, drop_name) != 0)
        return -1;
    return add_names(module, "COUNTERS", COUNTERS, pump_counter_name);
}

static PyModuleDef_Slot module_slots[] = {{Py_mod_exec, fill_module}, {0, NULL}};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, .m_name = "_pump", .m_size = 0, .m_slots = module_slots};

PyMODINIT_FUNC PyInit__pump(void)
{
    return PyModuleDef_Init(&definition);
}
