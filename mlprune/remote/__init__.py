"""From a laptop to a cluster: a sweep is sent to the cluster's head and watched through ssh.

job_package   JobPackage: what is sent, as one zip file and a command
jobs          Cluster: submitting, finding and watching sweeps as Ray jobs; `cluster_status`
ssh           the cluster's head: its address, commands over ssh, and a tunnel
"""
