-module(compress_ffi).

-export([print/1, decimals/1, arguments/0]).

print(Line) ->
    io:format("~ts~n", [Line]),
    nil.

decimals(Float) -> float_to_binary(Float, [{decimals, 2}]).

arguments() -> [unicode:characters_to_binary(Argument) || Argument <- init:get_plain_arguments()].
