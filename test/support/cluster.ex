defmodule VivaTensor.Test.Cluster do
  @moduledoc """
  Other nodes on this machine, each an operating system process of its own.
  """

  alias VivaTensor.Telemetry

  # What a node that does not answer is given up after, in seconds.
  @tick 8

  @doc "Gives this node a name, so that others can connect to it."
  def start! do
    # The daemon that knows the ports of nodes; it stays where one runs already.
    {_, 0} = System.cmd("epmd", ["-daemon"])
    # Under a name that the others can be connected with.
    if Node.alive?(), do: :ok = Node.stop()
    {:ok, _} = Node.start(name("test"), :longnames)
    :net_kernel.set_net_ticktime(@tick, 0)
    :ok
  end

  @doc "A node with viva_tensor in its path: its control process, its name and its operating system process."
  def peer!(opts \\ []) do
    threads = Keyword.get(opts, :threads, 1)
    node = opts |> Keyword.get_lazy(:node, fn -> name("peer") end) |> Atom.to_string()
    [name, host] = String.split(node, "@")
    paths = for path <- :code.get_path(), do: [~c"-pa", path]
    cookie = Node.get_cookie() |> Atom.to_charlist()

    args =
      [~c"-setcookie", cookie, ~c"-kernel", ~c"net_ticktime", ~c"#{@tick}"] ++
        [~c"-connect_all", ~c"false"] ++ Enum.concat(paths)

    exec = for program <- List.wrap(opts[:exec]), do: {:exec, program}

    {:ok, control, node} =
      [name: to_charlist(name), host: to_charlist(host), longnames: true, args: args]
      |> Keyword.merge(connection: :standard_io, wait_boot: 120_000)
      |> Keyword.merge([env: [{~c"VIVA_TENSOR_THREADS", ~c"#{threads}"}]] ++ exec)
      |> Map.new()
      |> :peer.start()

    {:ok, _} = :peer.call(control, Application, :ensure_all_started, [:viva_tensor], :infinity)
    os_pid = :peer.call(control, System, :pid, []) |> String.to_integer()
    %{control: control, node: node, os_pid: os_pid}
  end

  @doc "Sends a signal to the operating system process of a node: KILL, STOP or CONT."
  def signal(peer, signal),
    do: {_, 0} = System.cmd("sh", ["-c", "kill -#{signal} #{peer.os_pid}"])

  @doc """
  Workers of a node wait at the start of their unit until they are told to go on: the
  calling process gets `{:holding, worker, unit}` from each.
  """
  def hold_units(peer), do: :peer.call(peer.control, __MODULE__, :hold_for, [self()], :infinity)

  @doc false
  def hold_for(test) do
    Telemetry.attach(:hold, [[:viva_tensor, :unit, :start]], &__MODULE__.hold/4, test)
  end

  @doc false
  def hold(_event, _measurements, unit, test) do
    send(test, {:holding, self(), unit})
    receive do: (:go -> :ok)
  end

  @doc "Ends a node, whatever state it is in."
  def stop(peer) do
    System.cmd("sh", ["-c", "kill -9 #{peer.os_pid}"], stderr_to_stdout: true)
    monitor = Process.monitor(peer.control)
    receive do: ({:DOWN, ^monitor, _, _, _} -> :ok)
  end

  @doc "A name for a node. The loopback address needs no resolver."
  def name(what),
    do: :"viva-#{what}-#{System.pid()}-#{System.unique_integer([:positive])}@127.0.0.1"
end
