"""Serving: OpenAI's protocol over models of any kind, with batches that rows join and leave between steps.

    app           HTTP: routes, limits, streams of events; page.html is the playground
      | protocol  requests and responses as OpenAI defines them
      | text      a request to rows of tokens, and what is revealed to text
    engine        a thread that runs the rows of all requests, fairly
      | running_batch   compiled programs, and the slots that rows join and leave
"""
