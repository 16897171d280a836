defmodule VivaTensor.Job.Members do
  @moduledoc false
  # The other nodes of a job, as the job sees them.
  #
  # A node joins when its member (`VivaTensor.Job.Member`) has made the plan, which a
  # process of its own waits for, since the node may answer late or never. One that does
  # not answer, or is lost, is asked again every few seconds and whenever it comes up; one
  # that refuses, because it sees another source or no output, is not.

  alias VivaTensor.{Error, Native}
  alias VivaTensor.Job.{Member, Options, Step, Workers}

  # Between two attempts at a node that does not answer.
  @again_ms 3_000

  defstruct wanted: [], invitation: nil, joining: %{}, joined: %{}, refused: [], silent: []

  @typedoc """
  `wanted` are names of nodes, or all that are connected; those that are `joining` are
  by what their process is known by, those that `joined` by node. Of those that are `silent` it was told.
  """
  @type t :: %__MODULE__{
          wanted: [node] | :connected,
          invitation: Member.invitation() | nil,
          joining: %{reference => node},
          joined: %{
            node => %{pid: pid, monitor: reference, workers: pos_integer}
          },
          refused: [node],
          silent: [node]
        }

  @typedoc "What is told of a node."
  @type event :: %{
          node: node,
          state: :joined | :lost | :refused | :silent,
          reason: String.t() | nil
        }

  @doc "Asks the nodes that the calling job wants to join."
  @spec invite(map) :: t
  def invite(%{options: %{nodes: []}}), do: %__MODULE__{}

  def invite(%{options: options, identity: identity, found: found, output: output}) do
    {:ok, directory} = Native.output_path(output)

    invitation = %{
      job: self(),
      options: Options.to_keyword(options),
      identity: identity,
      output: directory,
      scales: found.scales
    }

    :net_kernel.monitor_nodes(true)
    again()
    ask(%__MODULE__{wanted: options.nodes, invitation: invitation})
  end

  defp again, do: Process.send_after(self(), {__MODULE__, :again}, @again_ms)

  defp ask(members) do
    nodes = if members.wanted == :connected, do: Node.list(), else: members.wanted
    busy = [node() | members.refused] ++ Map.values(members.joining) ++ Map.keys(members.joined)
    Enum.reduce(nodes -- busy, members, &ask(&2, &1))
  end

  defp ask(members, node) do
    invitation = members.invitation

    task =
      Task.Supervisor.async_nolink(Workers, fn ->
        if Node.connect(node), do: :erpc.call(node, Member, :join, [invitation]), else: :down
      end)

    %{members | joining: Map.put(members.joining, task.ref, node)}
  end

  @doc """
  Takes a message to the calling job: what is to be told of it, or `:unknown` if it is
  about something else. Of the steps that a lost node leaves behind the job gets word as
  of workers that died.
  """
  @spec handle(term, t, %{reference => Step.t()}) :: {t, [event]} | :unknown
  # Since the job let them go.
  def handle({__MODULE__, :again}, %{wanted: []} = members, _running), do: {members, []}

  def handle({__MODULE__, :again}, members, _running) do
    again()
    {ask(members), []}
  end

  def handle({:nodeup, _node}, members, _running), do: {ask(members), []}
  def handle({:nodedown, _node}, members, _running), do: {members, []}

  def handle({ref, answer}, members, _running) when is_map_key(members.joining, ref) do
    Process.demonitor(ref, [:flush])
    {node, joining} = Map.pop!(members.joining, ref)
    members = %{members | joining: joining}

    case answer do
      # It comes when the job has let the others go.
      {:ok, pid, _workers} when members.wanted == [] ->
        send(pid, :dismiss)
        {members, []}

      {:ok, pid, workers} ->
        members = %{members | silent: members.silent -- [node]}
        member = %{pid: pid, monitor: Process.monitor(pid), workers: workers}
        members = %{members | joined: Map.put(members.joined, node, member)}
        {members, [told(node, :joined)]}

      {:error, %Error{message: message}} ->
        {%{members | refused: [node | members.refused]}, [told(node, :refused, message)]}

      :down ->
        silent(node, members)
    end
  end

  # Asking failed: the node went away, or has no such module.
  def handle({:DOWN, ref, :process, _pid, reason}, members, _running)
      when is_map_key(members.joining, ref) do
    {node, joining} = Map.pop!(members.joining, ref)
    members = %{members | joining: joining}

    case reason do
      {{:exception, :undef, _}, _} ->
        text = "it has no viva_tensor, or another version of it"
        {%{members | refused: [node | members.refused]}, [told(node, :refused, text)]}

      _ ->
        silent(node, members)
    end
  end

  def handle({:DOWN, monitor, :process, pid, reason}, members, running) do
    case Enum.find(members.joined, fn {_, member} -> member.monitor == monitor end) do
      {node, %{pid: ^pid}} ->
        for {ref, %{node: ^node}} <- running,
            do: send(self(), {:DOWN, ref, :process, nil, :noconnection})

        members = %{members | joined: Map.delete(members.joined, node)}
        {members, [told(node, :lost, inspect(reason))]}

      nil ->
        :unknown
    end
  end

  def handle(_message, _members, _running), do: :unknown

  # Once, not every few seconds.
  defp silent(node, members) do
    if node in members.silent do
      {members, []}
    else
      text = "it does not answer, and is asked again every few seconds"
      {%{members | silent: [node | members.silent]}, [told(node, :silent, text)]}
    end
  end

  defp told(node, state, reason \\ nil), do: %{node: node, state: state, reason: reason}

  @doc "How many units all of them do at once."
  @spec workers(t) :: non_neg_integer
  def workers(members) do
    members.joined |> Map.values() |> Enum.map(& &1.workers) |> Enum.sum()
  end

  @doc "The node with the most workers that the steps which are away leave free, if any are."
  @spec free(t, [Step.t()]) :: node | nil
  def free(%{joined: joined}, away) do
    taken = Enum.frequencies_by(away, & &1.node)
    free = for {node, member} <- joined, do: {member.workers - Map.get(taken, node, 0), node}

    case Enum.max(free, fn -> {0, nil} end) do
      {free, node} when free > 0 -> node
      _ -> nil
    end
  end

  @doc """
  Whether another node can do a step: a unit of a shard that is in the plan. What failed
  is tried again here, whatever the reason was.
  """
  @spec can_do?(Step.t()) :: boolean
  def can_do?(%{attempt: attempt}) when attempt > 1, do: false
  def can_do?(%{work: {:unit, _unit, [_]}}), do: true
  def can_do?(%{work: {:recall, _unit, [_], {what, _}}}), do: what in [:unit, :rows]
  def can_do?(_step), do: false

  @doc "Sends a step to a node, with the mark of its shard's file: what its answer is known by, and the step."
  @spec send_step(t, node, Step.t(), String.t(), %{reference => Step.t()}) ::
          {reference, Step.t()}
  def send_step(members, node, step, mark, running) do
    ref = make_ref()
    pid = members.joined[node].pid
    send(pid, {:do, ref, step, mark})
    {ref, Step.away(step, node, {pid, ref}, running)}
  end

  @doc "Lets all of them go."
  @spec dismiss(t) :: t
  def dismiss(members) do
    if members.wanted != [], do: :net_kernel.monitor_nodes(false)
    for {_node, member} <- members.joined, do: send(member.pid, :dismiss)
    %__MODULE__{joining: members.joining}
  end
end
