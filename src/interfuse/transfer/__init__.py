"""Parameters and structure of one network in another: copied, adapted, grown, shared. Nothing here is trained by itself."""
