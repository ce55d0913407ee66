"""The online shell: OpenAI's REST shapes over the engine, on FastAPI and Ray Serve."""
