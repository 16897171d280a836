defmodule VivaTensor.CLI.Nodes do
  @moduledoc false
  # The other nodes of a job that is started from the command line.
  #
  # A VM without a name gets one for as long as the task runs, of the kind that the others
  # have: short where their hosts have no dot, long otherwise. Its cookie is that of the
  # user, `~/.erlang.cookie`, unless the VM was given another.

  alias VivaTensor.Error

  @doc """
  The names of a `--nodes` flag.

      iex> VivaTensor.CLI.Nodes.parse("a@one, b@two")
      {:ok, [:a@one, :b@two]}
      iex> VivaTensor.CLI.Nodes.parse("connected")
      {:ok, :connected}
      iex> VivaTensor.CLI.Nodes.parse("one")
      {:error, "--nodes: one is no name of a node, such as worker@one"}
  """
  @spec parse(String.t()) :: {:ok, [node] | :connected} | {:error, String.t()}
  def parse("connected"), do: {:ok, :connected}

  def parse(text) do
    names = text |> String.split(",") |> Enum.map(&String.trim/1)

    case Enum.find(names, &(not (&1 =~ ~r/^[^@\s]+@[^@\s]+$/))) do
      nil -> {:ok, Enum.map(names, &String.to_atom/1)}
      name -> {:error, "--nodes: #{name} is no name of a node, such as worker@one"}
    end
  end

  @doc "The option of a job for these flags; gives this node a name if it has to have one."
  @spec option(keyword) :: {:ok, keyword} | {:error, Error.t()}
  def option(flags) do
    with text when text != nil <- flags[:nodes],
         {:ok, nodes} = parse(text),
         :ok <- distributed(nodes) do
      {:ok, [nodes: nodes]}
    else
      nil -> {:ok, []}
      {:error, error} -> {:error, error}
    end
  end

  defp distributed(nodes) do
    if Node.alive?(), do: :ok, else: start(nodes)
  end

  defp start(:connected), do: cannot("only a node with a name is connected to others")

  defp start([node | _]) do
    # The daemon that knows the ports of nodes, as `erl -sname` starts it.
    if epmd = System.find_executable("epmd"), do: System.cmd(epmd, ["-daemon"])
    [_, host] = node |> Atom.to_string() |> String.split("@")
    name = "viva_tensor_#{System.pid()}"

    {name, kind} =
      cond do
        # One machine: no name of its own has to be found out.
        host == "127.0.0.1" -> {"#{name}@#{host}", :longnames}
        String.contains?(host, ".") -> {name, :longnames}
        true -> {name, :shortnames}
      end

    case Node.start(String.to_atom(name), kind) do
      {:ok, _} -> :ok
      {:error, reason} -> cannot(inspect(reason))
    end
  end

  defp cannot(why) do
    Error.option(
      :job,
      "nodes",
      "this VM cannot be given a name: #{why}; start it with one, for example " <>
        "elixir --sname me -S mix viva.quantize …"
    )
  end
end
