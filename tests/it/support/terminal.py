# Runs a program in a terminal of its own, and keeps the screen as a user would see it.
#
#   terminal.py PROGRAM ARGUMENT…
#
# Does what its input says, a line each, and answers each with a line:
#   wait TEXT    until the screen shows it            "ok", or "not shown" with the screen
#   size R C     gives the terminal another size      "ok"
#   send HEX     types these bytes                    "ok"
#   signal N     sends a signal                       "ok"
#   end          until the program has ended          its exit status and "restored", or what is not
import codecs, fcntl, os, pty, re, select, signal, struct, subprocess, sys, termios, time

LIMIT = 60
ours, its = pty.openpty()


def resize(rows, columns):
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


resize(24, 80)
before = termios.tcgetattr(its)
environment = dict(os.environ, TERM="xterm-256color")
environment.pop("NO_COLOR", None)


def own_terminal():
    os.setsid()
    fcntl.ioctl(its, termios.TIOCSCTTY, 0)


program = subprocess.Popen(
    sys.argv[1:], stdin=its, stdout=its, stderr=its, env=environment, preexec_fn=own_terminal
)
decoder = codecs.getincrementaldecoder("utf-8")("replace")
pending = ""
screen, row, column = {}, 1, 1
alternate, hidden = False, False
# Control sequences with parameters, other escapes of two characters, or one character.
TOKEN = re.compile(r"\x1b\[([?0-9;]*)([A-Za-z])|\x1b[^\[]|[^\x1b]", re.S)


def feed(text):
    global pending, row, column, alternate, hidden
    pending += text
    at = 0
    while token := TOKEN.match(pending, at):
        at = token.end()
        parameters, kind = token.group(1), token.group(2)
        if kind == "H":
            place = [int(n or 1) for n in (parameters or "1;1").split(";")]
            row, column = place[0], place[1] if len(place) > 1 else 1
        elif kind == "J" and parameters == "2":
            screen.clear()
        elif kind in ("h", "l") and parameters == "?1049":
            alternate = kind == "h"
        elif kind in ("h", "l") and parameters == "?25":
            hidden = kind == "l"
        elif kind is None and len(token.group(0)) == 1:
            letter = token.group(0)
            if letter == "\r":
                column = 1
            elif letter == "\n":
                row += 1
            elif letter >= " ":
                screen[row, column] = letter
                column += 1
    pending = pending[at:]


def read(wait):
    if not select.select([ours], [], [], wait)[0]:
        return False
    try:
        feed(decoder.decode(os.read(ours, 65536)))
    except OSError:
        return False
    return True


def shown():
    rows = max((r for r, _ in screen), default=0)
    columns = max((c for _, c in screen), default=0)
    lines = ("".join(screen.get((r, c), " ") for c in range(1, columns + 1)) for r in range(1, rows + 1))
    return "\n".join(line.rstrip() for line in lines)


for line in sys.stdin:
    word, _, rest = line.rstrip("\n").partition(" ")
    deadline = time.monotonic() + LIMIT
    answer = "ok"
    if word == "wait":
        while rest not in shown() and time.monotonic() < deadline:
            if program.poll() is not None and not read(0):
                break
            read(0.05)
        if rest not in shown():
            answer = "not shown: " + repr(shown())
    elif word == "size":
        screen.clear()
        resize(*map(int, rest.split()))
        program.send_signal(signal.SIGWINCH)
    elif word == "send":
        os.write(ours, bytes.fromhex(rest))
    elif word == "signal":
        program.send_signal(int(rest))
    elif word == "end":
        while program.poll() is None and time.monotonic() < deadline:
            read(0.05)
        if program.poll() is None:
            program.kill()
        while read(0.05):
            pass
        answer = str(program.wait())
        answer += " restored" if termios.tcgetattr(its) == before else " modes"
        answer += " alternate" if alternate else ""
        answer += " hidden" if hidden else ""
    print(answer, flush=True)
