defmodule VivaTensor.Options do
  @moduledoc false
  # Keyword lists of options that Elixir code looks at.

  alias VivaTensor.Error

  @doc "The values of the options that an operation takes, defaults filled in."
  @spec take(atom, keyword, keyword) :: {:ok, [term]} | {:error, Error.t()}
  def take(op, options, defaults) do
    cond do
      not Keyword.keyword?(options) ->
        Error.option(op, "options", "expected a keyword list, got #{inspect(options)}")

      unknown = Enum.find(Keyword.keys(options), &(not Keyword.has_key?(defaults, &1))) ->
        known = Enum.map_join(defaults, ", ", fn {k, _} -> to_string(k) end)
        Error.option(op, to_string(unknown), "no such option; it takes #{known}")

      true ->
        {:ok, Enum.map(defaults, fn {k, default} -> Keyword.get(options, k, default) end)}
    end
  end
end
