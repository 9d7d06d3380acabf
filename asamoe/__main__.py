"`python -m asamoe` is the command `asamoe`. It can be interrupted from its first moment on."
import os, signal, sys


def leave(number, frame):
    "Asked to end: at once while something is imported, which ends badly otherwise; else as at Ctrl-C."
    while frame:
        if frame.f_code.co_filename.startswith('<frozen importlib'):
            os.write(2, b'asamoe: interrupted.\n'); os._exit(130)
        frame = frame.f_back
    raise KeyboardInterrupt


def hear(answer=leave):
    "Let `answer` follow Ctrl-C, a request to end and a closing terminal, but for those that are ignored (nohup)."
    for name in ('SIGINT', 'SIGTERM', 'SIGHUP'):
        number = getattr(signal, name, None)
        if number and signal.getsignal(number) != signal.SIG_IGN: signal.signal(number, answer)


def main():
    hear()
    try:
        from asamoe.cli import main
        return main()
    finally: hear(signal.SIG_DFL)                                 # what ends now is only the process


if __name__ == '__main__': sys.exit(main())
