"""The offline shell: distil, train, calibrate, evaluate and register, on Ray Data and Ray Train."""
