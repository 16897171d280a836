%% Runs the tests, and gives them what Gleam's prelude does not have.
-module(viva_tensor_gleam_test_ffi).

-export([main/0, directory/0, model/0, wave/1]).

-define(TESTS, viva_tensor_gleam_test).

main() ->
    {ok, _} = application:ensure_all_started(viva_tensor_gleam),
    Tests = [Name || {Name, 0} <- ?TESTS:module_info(exports), is_test(Name)],
    Failed = [Name || Name <- Tests, not passes(Name)],
    io:format("~b tests, ~b failed~n", [length(Tests), length(Failed)]),
    erlang:halt(min(1, length(Failed))).

is_test(Name) -> lists:suffix("_test", atom_to_list(Name)).

passes(Name) ->
    try
        ?TESTS:Name(),
        true
    catch
        Class:Reason:Stack ->
            io:format("~s: ~p ~p~n~p~n", [Name, Class, Reason, Stack]),
            false
    end.

%% Whoever starts the tests says where they may write, and removes it.
directory() ->
    Name = integer_to_list(erlang:unique_integer([positive])),
    Directory = filename:join(os:getenv("VIVA_TENSOR_TEST_DIRECTORY", "build/test"), Name),
    ok = filelib:ensure_path(Directory),
    unicode:characters_to_binary(Directory).

model() -> unicode:characters_to_binary(os:getenv("VIVA_TENSOR_TEST_MODEL", "../examples/models/viva-tiny")).

wave(Elements) -> [math:sin(I) || I <- lists:seq(1, Elements)].
