defmodule VivaTensor.ExamplesTest do
  # That each public function is shown by an example that the other tests run.
  use ExUnit.Case, async: true

  alias VivaTensor.Test.Examples

  @pages ["README.md" | Path.wildcard("{docs,notebooks}/**/*.{md,cheatmd,livemd}")]

  # Of the library, not of what its tests share.
  defp modules do
    for module <- Application.spec(:viva_tensor, :modules),
        source = Path.relative_to_cwd(module.__info__(:compile)[:source]),
        String.starts_with?(source, "lib/"),
        do: module
  end

  # Those that the documentation has a page of: not implementations of protocols.
  defp documented do
    for module <- modules(), {page, _} = docs(module), page != :hidden, not impl?(module) do
      module
    end
  end

  defp impl?(module), do: function_exported?(module, :__impl__, 1)

  defp docs(module) do
    assert {:docs_v1, _, _, _, page, _, functions} = Code.fetch_docs(module)
    {page, functions}
  end

  # What iex is shown, in the page of a module and those of its functions.
  defp doctests(module) do
    {page, functions} = docs(module)

    for %{"en" => text} <- [page | Enum.map(functions, &elem(&1, 3))],
        [line] <- Regex.scan(~r/^ *(?:iex|\.\.\.)>.*$/m, text),
        into: "",
        do: line <> "\n"
  end

  # As it is called where VivaTensor's modules have aliases.
  defp short(VivaTensor), do: "VivaTensor"
  defp short(module), do: module |> Module.split() |> tl() |> Enum.join(".")

  test "every public function that is documented has one" do
    blocks = for page <- @pages, {_, code, _} <- Examples.blocks(page, "elixir"), do: code
    modules = documented()
    assert VivaTensor in modules
    shown = IO.iodata_to_binary([blocks, Enum.map(modules, &doctests/1)])

    missing =
      for module <- modules,
          {_page, functions} = docs(module),
          {{:function, name, arity}, _, _, doc, _} when doc != :hidden <- functions,
          # Given by `use`.
          name != :child_spec,
          plain = name |> to_string() |> String.trim_trailing("!"),
          not (shown =~ ~r/(^|[^.\w]|VivaTensor\.)#{short(module)}\.#{plain}!?\(/),
          do: Exception.format_mfa(module, name, arity)

    assert missing == []
  end

  test "what iex is shown is run, also where no page shows it" do
    tests = Path.wildcard("test/**/*_test.exs") |> Enum.map_join(&File.read!/1)

    for module <- modules(), doctests(module) != "" do
      assert tests =~ ~r/^ *doctest #{inspect(module)}$/m, "no test runs those of #{module}"
    end
  end

  test "every documented module is in a group" do
    groups = Mix.Project.config()[:docs][:groups_for_modules]
    # Tasks have one of their own.
    modules = Enum.reject(documented(), &match?("Elixir.Mix.Tasks." <> _, to_string(&1)))
    grouped = groups |> Keyword.values() |> List.flatten()
    assert Enum.sort(modules) == Enum.sort(grouped)
  end
end
