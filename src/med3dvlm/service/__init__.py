"""The workstation's server: studies in, drafts and answers out, nothing final before it is signed.

    settings.py   what can be set, from defaults, a YAML file, the environment and the command line
    database.py   SQLite or PostgreSQL; tables.py says what is kept in it
    storage.py    files on disk or on object storage
    work.py       the queue and the workers; tasks.py what they do
    api/          the endpoints; app.py puts them together

Research use only; not a medical device.
"""
