"""Many servers behind one address, on Ray Serve: `loramix serve --replicas N`, and deploy/ray/ for clusters.

Ray's HTTP proxy ──► Ingress (front.py: body → session) ──► Ray's router ──► Replica (an actor) ──► its `loramix serve`
"""
