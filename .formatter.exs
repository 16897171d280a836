[
  inputs: ["{mix,.formatter}.exs", "native/*.exs", "{lib,test,bench,examples}/**/*.{ex,exs}"]
]
