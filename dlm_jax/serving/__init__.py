"""Serving: OpenAI's protocol over models of any kind, with batches that rows join and leave between steps.

    server        uvicorn: addresses, signals, a graceful stop
    app           HTTP: routes, access, limits, clients that leave; page.html is the playground; metrics
      | protocol  requests and responses as OpenAI defines them
      | jobs      a request to rows of tokens, the same as `DiffusionLM` makes
      | answer    the rows of a request while they are computed, and its body or chunks
      | text      what is revealed to text: final, from the left; steps: every forward pass
    engine        a thread that runs the rows of all requests, fairly
      | running_batch   compiled programs, and the slots that rows join and leave
"""
