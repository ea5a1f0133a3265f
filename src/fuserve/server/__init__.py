"""The HTTP server: OpenAI's API, metrics, and the web playground, over one ``AsyncEngine``.

``create_app`` makes the application, ``run_server`` runs it until it is told to stop.
"""
