%% Reshapes terms between Gleam and VivaTensor; nothing is decided here.
%%
%% Gleam's constructors are atoms and tuples: format.Nf4 is nf4 and
%% setting.BlockSize(64) is {block_size, 64}, which is an option as Elixir has it. What
%% cannot be spelled so is translated below.
-module(viva_tensor_gleam_ffi).

-export([from_bits/3, from_list/3, to_bits/1, to_list/1, cast/2]).
-export([dtype/1, shape/1, nbytes/1, bits_per_weight/1, quantized_format/1, release/1]).
-export([formats/0, format_name/1]).
-export([quantize/3, dequantize/2, matmul/3, prepack/1, metrics/2, output_error/3]).
-export([dump/1, load/1]).
-export([open/1, contents/1, get/2, total_bytes/1]).
-export([start/4, resume/2, status/1, await/2, cancel/1]).

-define(VIVA_TENSOR, 'Elixir.VivaTensor').
-define(TENSOR, 'Elixir.VivaTensor.Tensor').
-define(QUANTIZED, 'Elixir.VivaTensor.Quantized').
-define(CHECKPOINT, 'Elixir.VivaTensor.Checkpoint').
-define(JOB, 'Elixir.VivaTensor.Job').

%% Tensors

from_bits(Bits, Dtype, Shape) when is_binary(Bits) ->
    result(?TENSOR:from_binary(Bits, Dtype, Shape));
from_bits(_Bits, _Dtype, _Shape) ->
    %% What is no Elixir binary does not get there.
    {error, {invalid_option, <<"from_bits">>, <<"expected whole bytes">>, <<"bits">>}}.

from_list(Elements, Dtype, Shape) -> result(?TENSOR:from_list(Elements, Dtype, Shape)).

to_bits(Tensor) -> result(?TENSOR:to_binary(Tensor)).

to_list(Tensor) ->
    result(?TENSOR:to_list(Tensor), fun(Elements) -> [number(E) || E <- Elements] end).

cast(Tensor, Dtype) -> result(?TENSOR:cast(Tensor, Dtype)).

dtype(#{dtype := Dtype}) -> Dtype.

shape(#{shape := Shape}) -> Shape.

nbytes(#{nbytes := Bytes}) -> Bytes.

bits_per_weight(#{bits_per_weight := Bits}) -> Bits.

release(#{'__struct__' := Module} = Struct) ->
    ok = Module:release(Struct),
    nil.

%% Formats. A constructor has no underscores, so that those of ggml which end in a digit
%% come without the last one.

formats() -> [from_elixir(Name) || #{name := Name} <- ?VIVA_TENSOR:formats()].

format_name(Format) -> atom_to_binary(to_elixir(Format)).

quantized_format(#{format := Format}) -> from_elixir(Format).

to_elixir(q80) -> q8_0;
to_elixir(q51) -> q5_1;
to_elixir(q50) -> q5_0;
to_elixir(q41) -> q4_1;
to_elixir(q40) -> q4_0;
to_elixir(compressed_tensors) -> 'compressed-tensors';
to_elixir(Name) -> Name.

from_elixir(q8_0) -> q80;
from_elixir(q5_1) -> q51;
from_elixir(q5_0) -> q50;
from_elixir(q4_1) -> q41;
from_elixir(q4_0) -> q40;
from_elixir(Format) -> Format.

%% Operations

quantize(Tensor, Format, Settings) ->
    result(?VIVA_TENSOR:quantize(Tensor, to_elixir(Format), options(Settings))).

dequantize(Quantized, Dtype) -> result(?VIVA_TENSOR:dequantize(Quantized, [{dtype, Dtype}])).

matmul(X, Weights, Options) -> result(?VIVA_TENSOR:matmul(X, Weights, Options)).

prepack(Quantized) -> result(?VIVA_TENSOR:prepack(Quantized)).

metrics(Quantized, Original) ->
    result(?VIVA_TENSOR:metrics(Original, Quantized), fun(Metrics) ->
        {metrics, number(mse, Metrics), number(sqnr_db, Metrics), number(psnr_db, Metrics),
            number(cosine, Metrics), number(mean_error, Metrics), number(max_error, Metrics),
            map_get(bits_per_weight, Metrics), number(bound_distance_db, Metrics)}
    end).

output_error(Quantized, Original, Activations) ->
    result(
        ?VIVA_TENSOR:metrics(Original, Quantized, [{activations, Activations}]),
        fun(Metrics) -> number(output_error, Metrics) end
    ).

dump(Quantized) -> result(?QUANTIZED:dump(Quantized)).

load(Bits) when is_binary(Bits) -> result(?QUANTIZED:load(Bits));
load(_Bits) -> load(<<>>).

options(Options) -> [option(Option) || Option <- Options].

option({scales_per, row}) -> {block_size, row};
option({scales_per, whole_tensor}) -> {block_size, tensor};
option({duo_scaling, off}) -> {duo_scaling, false};
option({duo_scaling, on}) -> {duo_scaling, true};
option({layout, Layout}) -> {layout, to_elixir(Layout)};
option({non_finite, put_aside}) -> {non_finite, error};
option({nodes, Nodes}) -> {nodes, [binary_to_atom(Node) || Node <- Nodes]};
option(Option) -> Option.

%% Checkpoints

open(Path) -> result(?CHECKPOINT:open(Path)).

contents(Checkpoint) ->
    result(?CHECKPOINT:contents(Checkpoint), fun(Rows) -> [content(Row) || Row <- Rows] end).

content(Row) ->
    #{name := Name, format := Format, shape := Shape, nbytes := Bytes, tensors := Tensors} = Row,
    {content, Name, text(Format), optional_text(layout, Row), Shape, Bytes,
        optional(bits_per_weight, Row), Tensors}.

get(Checkpoint, Name) ->
    result(?CHECKPOINT:get(Checkpoint, Name), fun
        (#{'__struct__' := ?TENSOR} = Tensor) -> {dense, Tensor};
        (#{'__struct__' := ?QUANTIZED} = Quantized) -> {compressed, Quantized}
    end).

total_bytes(#{total_bytes := Bytes}) -> Bytes.

%% Jobs

start(Work, Source, Target, Options) ->
    result(?JOB:start([{source, Source}, {to, Target} | work(Work)] ++ options(Options))).

work({quantize, Format, Settings}) -> [{format, to_elixir(Format)} | options(Settings)];
work({recipe, Name, Settings}) -> [{recipe, binary_to_atom(Name)} | options(Settings)];
work({convert, Layout}) -> [{convert, to_elixir(Layout)}].

resume(Target, Options) -> result(?JOB:resume(Target, options(Options))).

status(Job) ->
    result(?JOB:status(Job), fun(Status) ->
        {status, map_get(state, Status), map_get(tensors, Status), map_get(tensors_done, Status),
            map_get(bytes, Status), map_get(bytes_done, Status), map_get(bytes_written, Status),
            map_get(running, Status), map_get(quarantined, Status), map_get(seconds, Status),
            map_get(bytes_per_second, Status), optional(eta_seconds, Status)}
    end).

await(Job, forever) -> outcome(?JOB:await(Job));
await(Job, {milliseconds, Milliseconds}) -> outcome(?JOB:await(Job, max(0, Milliseconds))).

cancel(Job) -> outcome(?JOB:cancel(Job)).

outcome({ok, Report}) -> {ok, {complete, report(Report)}};
outcome({partial, Report}) -> {ok, {partial, report(Report)}};
outcome({error, Error}) -> {error, failure(Error)}.

report(Report) ->
    {report, map_get(source, Report), map_get(target, Report), map_get(input_bytes, Report),
        map_get(output_bytes, Report), map_get(ratio, Report), map_get(quantized, Report),
        map_get(kept, Report), optional(lossless, Report), optional(bits_per_weight, Report),
        optional(sqnr_db, Report), map_get(seconds, Report),
        [row(Row) || Row <- map_get(tensors, Report)],
        [aside(Aside) || Aside <- map_get(quarantined, Report)]}.

row(Row) ->
    #{name := Name, shape := Shape, dtype := Dtype, format := Format} = Row,
    {row, Name, Shape, text(Dtype), text(Format), optional_text(reason, Row),
        map_get(input_bytes, Row), map_get(output_bytes, Row), optional(sqnr_db, Row)}.

aside(#{name := Name, reason := Reason, attempts := Attempts}) ->
    {aside, Name, Reason, Attempts}.

%% Results

result(Result) -> result(Result, fun(Value) -> Value end).

result({ok, Value}, Reshape) -> {ok, Reshape(Value)};
result({error, Error}, _Reshape) -> {error, failure(Error)}.

failure(#{op := Op, reason := {Kind, Details}, message := Message}) ->
    case fields(Kind) of
        unknown -> {other, text(Op), Message, text(Kind)};
        Fields -> list_to_tuple([Kind, text(Op), Message | [detail(F, Details) || F <- Fields]])
    end.

%% What the constructors of error.Error have besides the operation and the message.
fields(unknown_format) -> [name, known];
fields(unknown_layout) -> [name, known];
fields(unknown_dtype) -> [name, known];
fields(unknown_recipe) -> [name, known];
fields(invalid_option) -> [option];
fields(shape_mismatch) -> [what, expected, actual];
fields(size_mismatch) -> [what, expected, actual];
fields(shape_overflow) -> [shape];
fields(unsupported_dtype) -> [dtype];
fields(indivisible) -> [row, block];
fields(non_finite) -> [nan, inf];
fields(scale_overflow) -> [dtype];
fields(singular_hessian) -> [];
fields(released) -> [];
fields(layout_mismatch) -> [layout, format];
fields(invalid_file) -> [path];
fields(invalid_dump) -> [];
fields(unknown_tensor) -> [name];
fields(io) -> [path, code];
fields(cancelled) -> [];
fields(missing_statistics) -> [layers];
fields(already_quantized) -> [quant_method];
fields(invalid_vector) -> [vector];
fields(no_vectors) -> [];
fields(changed) -> [changes];
fields(unfinished) -> [path];
fields(nothing_to_resume) -> [path];
fields(worker_crashed) -> [work, attempts, reason];
fields(timeout) -> [milliseconds];
fields(no_job) -> [reason];
fields(another_node) -> [how];
fields(no_queue) -> [];
fields(missing_library) -> [library];
fields(_Newer) -> unknown.

detail(changes, #{changes := Changes}) ->
    [{change, text(What), text(How)} || #{what := What, how := How} <- Changes];
detail(Field, Details) ->
    case map_get(Field, Details) of
        Value when is_integer(Value); is_list(Value) -> Value;
        Value -> text(Value)
    end.

text(Text) when is_binary(Text) -> Text;
text(Name) when is_atom(Name) -> atom_to_binary(Name);
text(Other) -> 'Elixir.Kernel':inspect(Other).

number(Key, Map) -> number(map_get(Key, Map)).

number(Float) when is_float(Float) -> {finite, Float};
number(Integer) when is_integer(Integer) -> {finite, float(Integer)};
number(true) -> {finite, 1.0};
number(false) -> {finite, 0.0};
number(infinity) -> infinity;
number(neg_infinity) -> neg_infinity;
number(nan) -> not_a_number.

optional(Key, Map) ->
    case Map of
        #{Key := Value} when Value =/= nil -> {ok, Value};
        #{} -> {error, nil}
    end.

optional_text(Key, Map) ->
    case optional(Key, Map) of
        {ok, Value} -> {ok, text(Value)};
        Absent -> Absent
    end.
