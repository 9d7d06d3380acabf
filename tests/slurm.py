"Slurm on this machine, for a test: munge, a controller and two workers of one core, in a folder of their own."
import getpass, os, secrets, shutil, socket, subprocess, time
from pathlib import Path

import psutil

CONF = '''ClusterName=asamoe
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthInfo=socket={folder}/munge.socket
ProctrackType=proctrack/linuxproc
SelectType=select/cons_tres
TaskPlugin=task/none
ReturnToService=2
SlurmdTimeout=20
MinJobAge=3600
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
NodeName=w[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs=1 RealMemory=8000
PartitionName=all Nodes=ALL Default=YES State=UP
'''
PROGRAMS = ('munged', 'slurmctld', 'slurmd')


def program(name): return shutil.which(name, path=os.pathsep.join([os.environ['PATH'], '/usr/sbin', '/sbin']))
def missing(): return [name for name in PROGRAMS if not program(name)]


class Slurm:
    def __init__(self, folder):
        self.folder, self.processes = Path(folder), {}
        self.commands = self.folder/'bin'          # Snakemake's plugin takes SLURM_CONF from jobs; these give it back
        self.environment = os.environ | dict(SLURM_CONF=str(self.folder/'slurm.conf'),
                                             PATH=f"{self.commands}:{os.environ['PATH']}")

    def __enter__(self):
        host, port = socket.gethostname().split('.')[0], 20_000 + os.getpid() % 30_000
        for folder in (self.folder/'state', self.commands): folder.mkdir(parents=True)
        for name in ('sbatch', 'srun', 'squeue', 'scancel', 'sinfo', 'scontrol', 'sacct'):
            command = self.commands/name
            command.write_text(f'#!/bin/sh\nSLURM_CONF={self.folder}/slurm.conf exec {program(name)} "$@"\n')
            command.chmod(0o755)
        ports = dict(port=port, first=port + 1, last=port + 2)
        conf = CONF.format(host=host, user=getpass.getuser(), folder=self.folder, **ports)
        (self.folder/'slurm.conf').write_text(conf)
        key = self.folder/'munge.key'
        key.write_bytes(secrets.token_bytes(1024)); key.chmod(0o400)
        files = [f'--{name}={self.folder}/munge.{name.split("-")[0]}'
                 for name in ('socket', 'pid-file', 'seed-file', 'log-file')]
        try:
            self.start('munged', '--foreground', '--force', f'--key-file={key}', *files)
            self.start('slurmctld', '-D')
            for worker in ('w1', 'w2'): self.start_worker(worker)
            self.wait_for('the workers', lambda: self.tell('sinfo', '-h', '-N', '-o', '%T').split() == ['idle']*2)
        except BaseException: self.__exit__(); raise
        return self

    def __exit__(self, *exception):
        for name, process in reversed(self.processes.items()):
            if name.startswith('w'): self.kill_worker(name)
            else: process.terminate(); process.wait(20)

    def start(self, name, *arguments, label=''):
        with (self.folder/f'{label or name}.out').open('ab') as out:
            command = [program(name), *arguments]
            self.processes[label or name] = subprocess.Popen(command, stdout=out, stderr=out, env=self.environment)

    def start_worker(self, name): self.start('slurmd', '-D', '-N', name, label=name)

    def kill_worker(self, name):
        "End worker `name` and all that runs on it, as a machine does that loses its power."
        self.processes[name].kill(); self.processes[name].wait()
        jobs = self.tell('squeue', '-h', '-w', name, '-o', '%A').split()
        for process in psutil.process_iter():
            try:
                mine = str(self.commands) in process.environ().get('PATH', '')
                there = process.environ().get('SLURMD_NODENAME') == name
                step = any(f'[{job}.' in ' '.join(process.cmdline()) for job in jobs)
                if mine and (there or step): process.kill()
            except psutil.Error: pass

    def tell(self, *command):
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60).stdout

    def wait_for(self, what, so, seconds=60):
        end = time.time() + seconds
        while not so():
            logs = '\n'.join(p.read_text(errors='replace')[-1500:] for p in self.folder.glob('*.out'))
            assert time.time() < end, f'{what} did not come:\n{logs}'
            time.sleep(.2)
