defmodule VivaTensor.Test.Browser do
  @moduledoc """
  A headless Chromium, spoken to through its DevTools pipe: pages are shown, looked at
  and typed into as a reader does.
  """

  use GenServer

  alias VivaTensor.Native

  @names ~w(chromium chromium-browser google-chrome)
  @flags ~w(--headless --no-sandbox --disable-gpu --disable-quic --no-first-run) ++
           ~w(--disable-background-networking --disable-component-update --disable-sync) ++
           ~w(--disable-dev-shm-usage --hide-scrollbars --remote-debugging-pipe)
  @timeout_ms 120_000

  @keys %{"Tab" => 9, "Enter" => 13, "End" => 35, "ArrowLeft" => 37, "ArrowRight" => 39}

  # Requests, errors, words on the console, dialogs: what a page should have none of.
  @unwanted ~w(Network.requestWillBeSent Log.entryAdded Runtime.consoleAPICalled) ++
              ~w(Runtime.exceptionThrown Page.javascriptDialogOpening)

  @doc "The browser of this machine, if there is one."
  def executable, do: Enum.find_value(@names, &System.find_executable/1)

  @doc "Starts a browser that keeps its files in a directory."
  def start(directory) do
    {:ok, browser} = GenServer.start(__MODULE__, directory)
    %{"targetId" => id} = call(browser, "Target.createTarget", %{url: "about:blank"})
    attach = %{targetId: id, flatten: true}
    %{"sessionId" => session} = call(browser, "Target.attachToTarget", attach)
    GenServer.call(browser, {:session, session})
    for domain <- ~w(Page Runtime Log Network), do: call(browser, "#{domain}.enable")
    {:ok, browser}
  end

  @doc "Stops it, and returns when it has gone."
  def stop(browser), do: GenServer.stop(browser, :normal, @timeout_ms)

  @doc """
  Shows a file in a window of this size, in the scheme `"light"` or `"dark"`; returns what
  it asked for and complained of.
  """
  def open(browser, path, {width, height}, scheme) do
    size = %{width: width, height: height, deviceScaleFactor: 1, mobile: false}
    call(browser, "Emulation.setDeviceMetricsOverride", size)
    media(browser, "screen", scheme)
    url = "file://#{path}"
    GenServer.call(browser, :events)
    call(browser, "Page.navigate", %{url: url})

    evaluate(browser, """
    new Promise(shown => {
      const after = () => requestAnimationFrame(() => setTimeout(shown, 50));
      document.readyState === "complete" ? after() : addEventListener("load", after);
    })
    """)

    for %{"method" => method, "params" => params} <- GenServer.call(browser, :events),
        method in @unwanted,
        not allowed?(params["request"], url),
        do: {method, params}
  end

  defp allowed?(%{"url" => asked}, url), do: asked == url or String.starts_with?(asked, "data:")
  defp allowed?(nil, _url), do: false

  @doc "The medium, `\"screen\"` or `\"print\"`, and the scheme."
  def media(browser, medium, scheme) do
    features = [%{name: "prefers-color-scheme", value: scheme}]
    call(browser, "Emulation.setEmulatedMedia", %{media: medium, features: features})
  end

  @doc "The value of a JavaScript expression in the page."
  def evaluate(browser, expression) do
    what = %{expression: expression, returnByValue: true, awaitPromise: true}

    case call(browser, "Runtime.evaluate", what) do
      %{"exceptionDetails" => details} -> raise inspect(details)
      %{"result" => result} -> result["value"]
    end
  end

  @doc "Presses a key."
  def press(browser, key) do
    event = %{key: key, code: key, windowsVirtualKeyCode: Map.fetch!(@keys, key)}
    down = if key == "Enter", do: %{type: "keyDown", text: "\r"}, else: %{type: "keyDown"}
    call(browser, "Input.dispatchKeyEvent", Map.merge(event, down))
    call(browser, "Input.dispatchKeyEvent", Map.put(event, :type, "keyUp"))
  end

  @doc "The whole page as PNG."
  def screenshot(browser) do
    what = %{format: "png", captureBeyondViewport: true}
    browser |> call("Page.captureScreenshot", what) |> Map.fetch!("data") |> Base.decode64!()
  end

  @doc "The page as it is printed, as PDF."
  def pdf(browser) do
    browser |> call("Page.printToPDF") |> Map.fetch!("data") |> Base.decode64!()
  end

  defp call(browser, method, params \\ %{}) do
    case GenServer.call(browser, {:command, method, params}, @timeout_ms) do
      %{"result" => result} -> result
      %{"error" => error} -> raise "#{method}: #{inspect(error)}"
    end
  end

  # Messages are JSON, each ended by a zero. Chromium reads them from descriptor 3,
  # answers on 4, and leaves when the former is closed.

  @impl true
  def init(directory) do
    command = ~s(exec "$0" "$@" 3<&0 4>&1 >/dev/null 2>&1)
    args = ["-c", command, executable(), "--user-data-dir=#{directory}" | @flags]
    port = Port.open({:spawn_executable, "/bin/sh"}, [:binary, :exit_status, args: args])
    {:ok, %{port: port, session: nil, sent: 0, waiting: %{}, events: [], rest: ""}}
  end

  @impl true
  def handle_call({:session, session}, _from, state),
    do: {:reply, :ok, %{state | session: session}}

  def handle_call(:events, _from, state),
    do: {:reply, Enum.reverse(state.events), %{state | events: []}}

  def handle_call({:command, method, params}, from, state) do
    session = if state.session, do: %{sessionId: state.session}, else: %{}
    state = send_command(state, Map.merge(%{method: method, params: params}, session))
    {:noreply, %{state | waiting: Map.put(state.waiting, state.sent, from)}}
  end

  defp send_command(state, message) do
    {:ok, json} = message |> Map.put(:id, state.sent + 1) |> Native.json_encode(false)
    Port.command(state.port, [json, 0])
    %{state | sent: state.sent + 1}
  end

  @impl true
  def handle_info({port, {:data, bytes}}, %{port: port} = state) do
    {messages, [rest]} = (state.rest <> bytes) |> String.split(<<0>>) |> Enum.split(-1)
    {:noreply, Enum.reduce(messages, %{state | rest: rest}, &received/2)}
  end

  def handle_info({port, {:exit_status, status}}, %{port: port} = state),
    do: {:stop, {:browser_exited, status}, state}

  @impl true
  def terminate(:normal, %{port: port} = state) do
    send_command(state, %{method: "Browser.close"})
    receive(do: ({^port, {:exit_status, _}} -> :ok))
  end

  def terminate(_reason, _state), do: :ok

  defp received(json, state) do
    case Native.json_decode(json) do
      {:ok, %{"id" => id} = answer} ->
        {from, waiting} = Map.pop!(state.waiting, id)
        GenServer.reply(from, answer)
        %{state | waiting: waiting}

      {:ok, event} ->
        %{state | events: [event | state.events]}
    end
  end
end
