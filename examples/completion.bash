# completion.bash  Complete the options of tcpconnect and tcpaccept, and their values,
#                  in bash.
#
# USAGE: source examples/completion.bash
#
# Or for all users, where the package bash-completion looks for a file by the command's
# name:
#
#     directory=/usr/local/share/bash-completion/completions
#     sudo install -d $directory
#     sudo install -m 644 examples/completion.bash $directory/tcpconnect
#     sudo ln -sf tcpconnect $directory/tcpaccept
#
# Completion after `sudo` also needs that package.

# Arguments: the command, the current word, the previous word. bash splits --pid=18 into
# three words.
_tcptools() {
    local word=${2#=} option=$3 name at pids=(/proc/[0-9]*)
    local before=${word%"${word##*,}"} last=${word##*,} # of a list
    local options="-h --help -V --version -t --timestamp -p --pid -P --port -4 --ipv4
        -6 --ipv6 -a --addr -u --uid -n --name --cgroup --cgroupmap --mntnsmap -T --time
        -U --print-uid --unit --json -c --count -i --interval --per-process
        -b --buffer-pages"
    local pages="1 2 4 8 16 32 64 128 256 512 1024 2048 4096 8192 16384"
    for ((at = 1; at < COMP_CWORD; at++)); do
        if [[ ${COMP_WORDS[at]} == -- ]]; then
            _tcptools_command "$2"
            return
        fi
    done
    case ${1##*/} in
    tcpconnect) options+=" -x --failed -m --min-ms -L --lport -l --latency -d --dns" ;;
    tcpaccept) options+=" -x --failed -R --rport -q --queue" ;;
    esac
    if [[ $option == = ]]; then
        option=${COMP_WORDS[COMP_CWORD - 2]}
    fi
    COMPREPLY=()
    case $option in
    -p | --pid) set -- -P "$before" -W "${pids[*]##*/}" -- "$last" ;;
    -u | --uid) set -- -P "$before" -u -- "$last" ;;
    -b | --buffer-pages) set -- -W "$pages" -- "$word" ;;
    -P | --port | -a | --addr | -m | --min-ms | -i | --interval) return ;;
    -n | --name)
        # A process chooses its name: -W would run a $(command) in it
        while IFS= read -r name; do
            printf -v name %q "$name"
            if [[ $name == "$word"* ]]; then
                COMPREPLY+=("$name")
            fi
        done < <(cat /proc/[0-9]*/comm 2>/dev/null | sort -u)
        return
        ;;
    --cgroupmap | --mntnsmap)
        compopt -o default # file names, by readline
        return
        ;;
    --cgroup)
        compopt -o filenames -o nospace
        mapfile -t COMPREPLY < <(
            systemctl list-units --type=service --plain --no-legend "$word*" \
                2>/dev/null | cut -d ' ' -f 1
            top=$(findmnt -nfro TARGET -t cgroup2)
            [ "$top" ] && cd "$top" && compgen -d -S / -- "$word"
        )
        return
        ;;
    *) set -- -W "$options" -- "$word" ;;
    esac
    mapfile -t COMPREPLY < <(compgen "$@")
}

# Behind --: a command, and what it is completed with, or without that package its name
# and files. Argument: the current word. The caller has, in at, which word -- is.
_tcptools_command() {
    if declare -F _command_offset >/dev/null; then
        _command_offset $((at + 1))
    elif ((at + 1 == COMP_CWORD)); then
        mapfile -t COMPREPLY < <(compgen -c -- "$1")
    else
        compopt -o default
    fi
}

complete -F _tcptools tcpconnect tcpaccept
