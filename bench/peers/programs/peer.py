"""What a program in Python does with requests; bench/peers/README.md lists them.

    python with_<program>.py COLUMNS WEIGHT ACTIVATIONS

The files hold rows of f32; `OMP_NUM_THREADS` is the number of threads. A format is
an object with some of these:

    quantize(w)     what is stored of floats w; `quantizes` says which dtype w has
    values(q)       its floats [n, k], as another dtype or reshaped where it likes
    dequantize(q)   the same, as the program does it: this is timed
    nbytes(q)       of codes and scales
    layer(q)        a function of activations, prepared once
    activations(x)  x as that function takes it
"""

import copy
import json
import os
import statistics
import sys
import time

import numpy

# Bytes that no cache holds.
PAST_CACHES = 256 << 20
# Rows of a product that are held to sums in f64.
CHECKED = 8

THREADS = int(os.environ["OMP_NUM_THREADS"])


def serve(formats, wrap):
    """Answers the requests on standard input; what fails is an answer too. `wrap`
    makes an array one of the program's, of a dtype by its name."""
    # Libraries write to standard output as they please.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    columns, weight, activations = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    data = [numpy.fromfile(path, numpy.float32).reshape(-1, columns) for path in (weight, activations)]
    program = Program(formats, wrap, *data)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = program.answer(request)
        except Exception as error:
            answer = {"absent": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


class Unquantized:
    """Weights as they are."""

    def quantize(self, w):
        return w

    def values(self, w):
        return w

    def nbytes(self, w):
        return w.nbytes


class Program:
    """The data, and what earlier requests made of it."""

    def __init__(self, formats, wrap, weight, activations):
        self.formats, self.wrap = formats, wrap
        self.weight, self.x = weight, activations
        self.quantized, self.layers, self.seen = {}, {}, set()

    def answer(self, request):
        format = self.formats[request["format"]]
        return getattr(self, request["op"])(format, request)

    def quantize(self, format, request):
        array = self.rows(request["rows"])
        w = self.wrap(array, getattr(format, "quantizes", request["dtype"]))
        seconds = timed(lambda: format.quantize(w), request)
        answer = {"seconds": seconds, "work": w.nbytes, "unit": "B"}
        if request.get("error"):
            answer["error"] = relative(array, floats(format.values(format.quantize(w))).reshape(array.shape))
        return answer

    def dequantize(self, format, request):
        q = self.codes(format, request)
        seconds = timed(lambda: format.dequantize(q), request)
        return {"seconds": seconds, "work": 4 * request["rows"] * self.weight.shape[1], "unit": "B"}

    def matmul(self, format, request):
        q, m = self.codes(format, request), request["m"]
        n, k = request["rows"], self.weight.shape[1]
        nbytes = format.nbytes(q)
        if format not in self.layers:
            count = -(-PAST_CACHES // nbytes)
            self.layers[format] = [format.layer(copy.deepcopy(q)) for _ in range(count)]
        layers = self.layers[format]
        x = format.activations(numpy.ascontiguousarray(self.x[:m]))
        # A layer may make itself ready for a number of rows when it first meets it.
        if (format, m) not in self.seen:
            self.seen.add((format, m))
            for layer in layers:
                layer(x)
        turn = iter(range(1 << 60))
        seconds = timed(lambda: layers[next(turn) % len(layers)](x), request)
        work, unit = (nbytes, "B") if m == 1 else (2 * m * n * k, "op")
        answer = {"seconds": seconds, "work": work, "unit": unit}
        if request.get("error"):
            w = floats(format.values(q)).reshape(n, k).astype(numpy.float64)
            exact = self.x[: min(m, CHECKED)].astype(numpy.float64) @ w.T
            answer["error"] = relative(exact, floats(layers[0](x)).reshape(m, n)[:CHECKED])
        return answer

    def rows(self, count):
        """As many rows of the weight as asked for, over and over."""
        return numpy.resize(self.weight, (count, self.weight.shape[1]))

    def codes(self, format, request):
        key = format, request["rows"]
        if key not in self.quantized:
            w = self.wrap(self.rows(request["rows"]), getattr(format, "quantizes", "f32"))
            self.quantized[key] = format.quantize(w)
        return self.quantized[key]


def timed(call, request):
    """The median over calls that take as long as asked for together; the first, which
    finds its memory untouched, does not count unless it takes ten times that long."""
    first = once(call)
    if first >= 10 * request["budget"]:
        return first
    took = []
    while sum(took) < request["budget"]:
        took.append(once(call))
    return statistics.median(took)


def once(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def floats(values):
    """A result as an array of f32."""
    return numpy.asarray(values.float() if hasattr(values, "float") else values, numpy.float32)


def relative(exact, approximate):
    return float(numpy.linalg.norm(approximate - exact) / numpy.linalg.norm(exact))
