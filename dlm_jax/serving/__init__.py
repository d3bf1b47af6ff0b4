"""Serving: OpenAI's protocol over models of any kind, with batches that rows join and leave between steps.

    server, app      signals; routes, limits, streams of events, metrics; page.html is the playground
      | protocol     requests and responses as OpenAI defines them
      | jobs         a request to choices: rows of tokens, and how their text is read
      | answer       its updates to a response: text (the final text from the left), steps (every forward pass)
    engine           a thread that runs the rows of all requests
      | queue        what waits, and which row starts next
      | running_batch   compiled programs, and the slots that rows join and leave
"""
