// The Python type `CallSite`: one call of an operator in compiled code, which repeats the launch that its first call
// found with the addresses of now. `call_site.py` compiles this file, and says what a launch is.
//
// Its 97 calls in a step of the 130M shape took 0.85 ms more in Python, where megabytes of weights between two calls leave
// neither code nor objects in the caches.
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <structmember.h>

#include <cstdint>
#include <exception>
#include <vector>

namespace {

using Kernel = void (*)(const void*);

// The address of a tensor's data, by torch's own function for code without its headers; throws for what is no tensor.
void* (*data_ptr)(PyObject*);

struct Input {
    Py_ssize_t position;  // among the fields
    Py_ssize_t argument;
    Py_ssize_t offset;  // bytes
};

struct CallSite {
    PyObject_HEAD
    vectorcallfunc call;
    PyObject* prepare;      // (*arguments) -> (output, launch to repeat or None)
    PyObject* get_threads;  // () -> int
    PyObject* allocate;     // (*allocation) -> output
    PyObject* launch;       // a `Replay` or None, and what it holds:
    Kernel kernel;
    long threads;
    std::vector<int64_t>* fields;
    std::vector<Input>* inputs;
    Py_ssize_t output;
    PyObject* allocation;  // borrowed from `launch`
};

// Take the numbers out of a `Replay`, a tuple.
bool bind(CallSite* self, PyObject* launch) {
    unsigned long long kernel;
    PyObject *constants, *inputs;
    if (!PyArg_ParseTuple(launch, "KlO!O!nO!", &kernel, &self->threads, &PyList_Type, &constants, &PyList_Type, &inputs,
                          &self->output, &PyTuple_Type, &self->allocation))
        return false;
    self->fields->clear();
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(constants); ++i)
        self->fields->push_back(PyLong_AsLongLong(PyList_GET_ITEM(constants, i)));
    self->inputs->clear();
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(inputs); ++i) {
        Input input;
        if (!PyArg_ParseTuple(PyList_GET_ITEM(inputs, i), "nnn", &input.position, &input.argument, &input.offset))
            return false;
        self->inputs->push_back(input);
    }
    if (PyErr_Occurred()) return false;
    self->kernel = reinterpret_cast<Kernel>(kernel);
    return true;
}

PyObject* first(CallSite* self, PyObject* const* arguments, size_t flags, PyObject* keywords) {
    self->kernel = nullptr;
    PyObject* prepared = PyObject_Vectorcall(self->prepare, arguments, flags, keywords);
    if (prepared == nullptr) return nullptr;
    PyObject *output, *launch;
    if (!PyArg_ParseTuple(prepared, "OO", &output, &launch)) {
        Py_DECREF(prepared);
        return nullptr;
    }
    Py_INCREF(output);
    Py_INCREF(launch);
    Py_DECREF(prepared);
    Py_XSETREF(self->launch, launch);
    if (launch != Py_None && !bind(self, launch)) Py_CLEAR(output);
    return output;
}

PyObject* repeat(CallSite* self, PyObject* const* arguments) {
    PyObject* output = nullptr;
    try {
        // Copies: other threads may repeat this launch or find another one while Python code or the kernel runs.
        const Kernel kernel = self->kernel;
        std::vector<int64_t> fields(*self->fields);
        const std::vector<Input> inputs(*self->inputs);
        const Py_ssize_t place = self->output;
        PyObject* allocation = Py_NewRef(self->allocation);
        output = PyObject_Call(self->allocate, allocation, nullptr);
        Py_DECREF(allocation);
        if (output == nullptr) return nullptr;
        for (const Input& input : inputs)
            fields[input.position] = reinterpret_cast<int64_t>(data_ptr(arguments[input.argument])) + input.offset;
        fields[place] = reinterpret_cast<int64_t>(data_ptr(output));
        Py_BEGIN_ALLOW_THREADS;
        kernel(fields.data());
        Py_END_ALLOW_THREADS;
    } catch (const std::exception& error) {
        PyErr_SetString(PyExc_RuntimeError, error.what());
        Py_CLEAR(output);
    }
    return output;
}

PyObject* call(PyObject* object, PyObject* const* arguments, size_t flags, PyObject* keywords) {
    auto* self = reinterpret_cast<CallSite*>(object);
    PyObject* count = PyObject_CallNoArgs(self->get_threads);
    if (count == nullptr) return nullptr;
    const long threads = PyLong_AsLong(count);
    Py_DECREF(count);
    if (self->kernel == nullptr || threads != self->threads) return first(self, arguments, flags, keywords);
    return repeat(self, arguments);
}

// --- the type ------------------------------------------------------------------------------------------------------

PyObject* create(PyTypeObject* type, PyObject* arguments, PyObject*) {
    PyObject *prepare, *get_threads, *allocate;
    if (!PyArg_ParseTuple(arguments, "OOO", &prepare, &get_threads, &allocate)) return nullptr;
    auto* self = reinterpret_cast<CallSite*>(type->tp_alloc(type, 0));
    if (self == nullptr) return nullptr;
    self->call = call;
    self->prepare = Py_NewRef(prepare);
    self->get_threads = Py_NewRef(get_threads);
    self->allocate = Py_NewRef(allocate);
    self->launch = Py_NewRef(Py_None);
    self->fields = new std::vector<int64_t>();
    self->inputs = new std::vector<Input>();
    return reinterpret_cast<PyObject*>(self);
}

void destroy(PyObject* object) {
    auto* self = reinterpret_cast<CallSite*>(object);
    PyTypeObject* type = Py_TYPE(object);
    Py_XDECREF(self->prepare);
    Py_XDECREF(self->get_threads);
    Py_XDECREF(self->allocate);
    Py_XDECREF(self->launch);
    delete self->fields;
    delete self->inputs;
    type->tp_free(object);
    Py_DECREF(type);
}

PyMemberDef members[] = {{"__vectorcalloffset__", T_PYSSIZET, offsetof(CallSite, call), READONLY, nullptr},
                         {"launch", T_OBJECT, offsetof(CallSite, launch), READONLY, nullptr},
                         {nullptr, 0, 0, 0, nullptr}};
PyType_Slot slots[] = {{Py_tp_new, reinterpret_cast<void*>(create)},
                       {Py_tp_dealloc, reinterpret_cast<void*>(destroy)},
                       {Py_tp_call, reinterpret_cast<void*>(PyVectorcall_Call)},
                       {Py_tp_members, members},
                       {0, nullptr}};
PyType_Spec spec = {"qmamba.CallSite", sizeof(CallSite), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_VECTORCALL, slots};

PyObject* set_data_ptr(PyObject*, PyObject* address) {
    const unsigned long long value = PyLong_AsUnsignedLongLong(address);
    if (PyErr_Occurred()) return nullptr;
    data_ptr = reinterpret_cast<void* (*)(PyObject*)>(value);
    Py_RETURN_NONE;
}

PyMethodDef functions[] = {{"set_data_ptr", set_data_ptr, METH_O, nullptr}, {nullptr, nullptr, 0, nullptr}};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "replay", nullptr, -1, functions};

}  // namespace

PyMODINIT_FUNC PyInit_replay() {
    PyObject* created = PyModule_Create(&module);
    if (created == nullptr) return nullptr;
    PyObject* type = PyType_FromSpec(&spec);
    if (type == nullptr || PyModule_AddObject(created, "CallSite", type) < 0) return nullptr;
    return created;
}
