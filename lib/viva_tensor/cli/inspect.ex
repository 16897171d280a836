defmodule VivaTensor.CLI.Inspect do
  @moduledoc false
  # The work behind `mix viva.inspect`: what a checkpoint holds.

  alias VivaTensor.{CLI, Error, Native, Size}
  alias VivaTensor.CLI.Style

  @behaviour CLI

  @task "viva.inspect"
  @switches [json: :boolean]

  @impl CLI
  def switches, do: @switches

  @doc "Reads the flags."
  @impl CLI
  @spec parse([String.t()]) :: {:ok, keyword} | :help | {:error, String.t()}
  def parse(argv) do
    case CLI.parse(argv, @switches) do
      {:ok, flags, [path]} -> {:ok, [path: path] ++ flags}
      {:ok, _flags, []} -> {:error, "which PATH?"}
      {:ok, _flags, [_, extra | _]} -> {:error, "one PATH at a time; what is #{inspect(extra)}?"}
      other -> other
    end
  end

  @doc "Prints the contents of a checkpoint. The application must be started."
  @impl CLI
  @spec run(keyword) :: CLI.exit_code()
  def run(flags) do
    path = Keyword.fetch!(flags, :path)

    with {:ok, checkpoint} <- path |> Native.checkpoint_open() |> Error.wrap(:source),
         {:ok, rows} <- checkpoint.ref |> Native.checkpoint_contents() |> Error.wrap(:source) do
      if flags[:json] do
        IO.puts(CLI.json(to_map(path, checkpoint, rows)))
      else
        IO.write(to_text(path, checkpoint, rows))
      end

      0
    else
      {:error, error} -> CLI.failure(@task, error, flags)
    end
  end

  defp to_map(path, checkpoint, rows) do
    %{
      path: path,
      bytes: checkpoint.total_bytes,
      files: Enum.map(checkpoint.files, &Path.basename/1),
      companions: companions(checkpoint),
      tensors: rows,
      totals: for({{format, layout}, rows} <- by_format(rows), do: total(format, layout, rows))
    }
  end

  defp to_text(path, checkpoint, rows) do
    [
      Style.table(
        [
          {"tensor", :left},
          {"format", :left},
          {"layout", :left},
          {"shape", :left},
          {"bytes", :right},
          {"bits/w", :right}
        ],
        for row <- rows do
          [
            row.name,
            row.format,
            row.layout,
            shape(row.shape),
            Size.format(row.nbytes),
            bits(row.bits_per_weight)
          ]
        end
      ),
      "\n",
      Style.table(
        [
          {"format", :left},
          {"layout", :left},
          {"tensors", :right},
          {"elements", :right},
          {"bytes", :right},
          {"bits/w", :right}
        ],
        for {{format, layout}, rows} <- by_format(rows) do
          total = total(format, layout, rows)

          [
            format,
            layout,
            total.tensors,
            total.elements,
            Size.format(total.bytes),
            bits(total.bits_per_weight)
          ]
        end
      ),
      "\n#{path}: #{length(rows)} tensors, #{Size.format(checkpoint.total_bytes)}",
      " in #{length(checkpoint.files)} #{if length(checkpoint.files) == 1, do: "file", else: "files"}",
      case companions(checkpoint) do
        [] -> "\n"
        companions -> ", beside #{Enum.join(companions, ", ")}\n"
      end
    ]
  end

  defp companions(checkpoint), do: Enum.map(checkpoint.companions, & &1.relative)

  defp by_format(rows), do: rows |> Enum.group_by(&{&1.format, &1.layout}) |> Enum.sort()

  defp total(format, layout, rows) do
    elements = rows |> Enum.map(&elements(&1.shape)) |> Enum.sum()
    bytes = rows |> Enum.map(& &1.nbytes) |> Enum.sum()

    %{
      format: format,
      layout: layout,
      tensors: length(rows),
      elements: elements,
      bytes: bytes,
      bits_per_weight: if(elements > 0, do: bytes * 8 / elements)
    }
  end

  defp elements(shape), do: Enum.reduce(shape, 1, &(&1 * &2))

  defp shape([]), do: "scalar"
  defp shape(shape), do: Enum.join(shape, "x")

  defp bits(bits) when is_number(bits), do: :erlang.float_to_binary(bits / 1, decimals: 3)
  defp bits(nil), do: ""
end
