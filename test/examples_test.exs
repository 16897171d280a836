defmodule VivaTensor.ExamplesTest do
  # That each public function is shown by an example that the other tests run.
  use ExUnit.Case, async: true

  alias VivaTensor.Test.Examples

  @pages ["README.md" | Path.wildcard("{docs,notebooks}/**/*.{md,cheatmd,livemd}")]

  # Modules that the documentation names; it has patterns for what is inside.
  @modules for {_group, modules} when is_list(modules) <-
                 Mix.Project.config()[:docs][:groups_for_modules],
               module when is_atom(module) <- modules,
               do: module

  defp docs(module) do
    assert {:docs_v1, _, _, _, page, _, functions} = Code.fetch_docs(module)
    {page, functions}
  end

  # What iex is shown, in the page of a module and those of its functions.
  defp doctests(module) do
    {page, functions} = docs(module)

    for %{"en" => text} <- [page | for({_, _, _, doc, _} <- functions, do: doc)],
        [line] <- Regex.scan(~r/^ *(?:iex|\.\.\.)>.*$/m, text),
        into: "",
        do: line <> "\n"
  end

  # As it is called where VivaTensor's modules have aliases.
  defp short(VivaTensor), do: "VivaTensor"
  defp short(module), do: module |> Module.split() |> tl() |> Enum.join(".")

  test "every public function of the documented modules has one" do
    blocks = for page <- @pages, {_, code, _} <- Examples.blocks(page, "elixir"), do: code
    shown = IO.iodata_to_binary([blocks, Enum.map(@modules, &doctests/1)])

    missing =
      for module <- @modules,
          {_page, functions} = docs(module),
          {{:function, name, arity}, _, _, doc, _} when doc != :hidden <- functions,
          # Given by `use`.
          name != :child_spec,
          plain = name |> to_string() |> String.trim_trailing("!"),
          not (shown =~ ~r/(^|[^.\w]|VivaTensor\.)#{short(module)}\.#{plain}!?\(/),
          do: Exception.format_mfa(module, name, arity)

    assert missing == []
  end
end
